//! A GRU layer on a CPU (Cho et al. 2014), as cuDNN and libtorch define it: with the gates of each
//! position `r, z = σ(W x + b + U h + c)` and `n = tanh(W x + b + r (U h + c))`, the new state is
//! `h' = (1 − z) n + z h`.
//!
//! A forward or backward step is one matrix product and one loop over the numbers. libtorch runs
//! about 10 operations in a forward step and 25 in a backward step, each over a few thousand
//! numbers, so that the overhead of an operation dominates. A position has one row `n, r, z, U_n h`
//! of gates, which the backward pass overwrites with their gradients: the first three quarters are
//! then the gradients with respect to `W x`, the last three those with respect to `U h`.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::autograd::with_backward;
use crate::elements::{elements, elements_mut};
use crate::vectors::{self, Loop, sigmoid, tanh};

/// Runs one layer over packed positions: `x: [P, D]` → states `[P, H]`.
///
/// The positions of step 0 of all sessions come first, then those of step 1, and so on.
/// `n_sessions[t]` sessions have a step `t`; it never increases, so that the sessions of a step are
/// the first ones of the step before. `layer` is `[W: [3H, D], U: [3H, H], b: [3H], c: [3H]]`, rows
/// in the order `r, z, n`. All tensors are f32 and on the CPU.
pub fn gru_layer(x: &Tensor, n_sessions: &[i64], layer: &[&Tensor]) -> Tensor {
    let &[input_weights, state_weights, input_bias, state_bias] = layer else {
        panic!("a layer has four parameters")
    };
    let (n_positions, width) = (x.size()[0], state_weights.size()[1]);
    let mut first = 0;
    let steps: Vec<Range<i64>> = n_sessions
        .iter()
        .map(|&n| {
            first += n;
            first - n..first
        })
        .collect();
    let (states, scan) = tch::no_grad(|| {
        // Rows `r, z, n` become `n, r, z`.
        let input_weights = input_weights.roll([width], [0]);
        let gates = x.new_empty([n_positions, 4 * width], (Kind::Float, x.device()));
        // `W x + b` needs no states, so one product serves all steps.
        let inputs = input_bias.roll([width], [0]).addmm(x, &input_weights.tr());
        gates.narrow(1, 0, 3 * width).copy_(&inputs);
        let states = x.new_empty([n_positions, width], (Kind::Float, x.device()));
        let state_weights = state_weights.detach();
        let scan = Scan { steps, x: x.detach(), input_weights, state_weights, gates, width };
        scan.forward(&states, state_bias);
        (states, scan)
    });
    let saved_states = states.shallow_clone();
    with_backward(
        states,
        &[x, input_weights, state_weights, input_bias, state_bias],
        move |gradient| scan.backward(&saved_states, gradient),
    )
}

/// The tensors of a forward pass that its backward pass needs.
struct Scan {
    /// Positions of each step.
    steps: Vec<Range<i64>>,
    x: Tensor,
    /// `W`, rows in the order `n, r, z`.
    input_weights: Tensor,
    /// `U`.
    state_weights: Tensor,
    /// `[P, 4H]`.
    gates: Tensor,
    /// `H`.
    width: i64,
}

impl Scan {
    fn forward(&self, states: &Tensor, bias: &Tensor) {
        for (number, step) in self.steps.iter().enumerate() {
            let previous = self.previous_states(states, number);
            let recurrent = match &previous {
                Some(previous) => bias.addmm(previous, &self.state_weights.tr()),
                None => bias.expand([len(step), -1], false).contiguous(),
            };
            let (mut gates, mut states) = (rows(&self.gates, step), rows(states, step));
            // SAFETY: only this function has `recurrent`, and the tensors of the gates and the
            // states until it returns. The previous states are other rows of theirs.
            let (gates, recurrent, previous, states) = unsafe {
                let previous = previous.as_ref().map_or(&[][..], |previous| elements(previous));
                (
                    elements_mut(&mut gates),
                    elements(&recurrent),
                    previous,
                    elements_mut(&mut states),
                )
            };
            vectors::run(ForwardStep {
                width: self.width as usize,
                gates,
                recurrent,
                previous,
                states,
            });
        }
    }

    /// From the gradient of the states to those of `x`, `W`, `U`, `b` and `c`.
    fn backward(self, states: &Tensor, gradient: Tensor) -> Vec<Tensor> {
        let width = self.width;
        let gradient = gradient.contiguous();
        // Gradients of a step's states through the next step: none after the last step.
        let mut through_next = gradient.narrow(0, 0, 0);
        for (number, step) in self.steps.iter().enumerate().rev() {
            let previous = self.previous_states(states, number);
            let mut to_previous =
                gradient.new_empty([len(step), width], (Kind::Float, gradient.device()));
            let (mut gates, gradients) = (rows(&self.gates, step), rows(&gradient, step));
            // SAFETY: only this function has the gates, which it allocated in the forward pass, and
            // `to_previous`. Nothing writes to the others during the call.
            let (gates, gradients, through_last, previous, outputs) = unsafe {
                let previous = previous.as_ref().map_or(&[][..], |previous| elements(previous));
                let gates = elements_mut(&mut gates);
                (
                    gates,
                    elements(&gradients),
                    elements(&through_next),
                    previous,
                    elements_mut(&mut to_previous),
                )
            };
            vectors::run(BackwardStep {
                width: width as usize,
                gates,
                gradients,
                through_next: through_last,
                previous,
                to_previous: outputs,
            });
            if number > 0 {
                // `h` also reaches `h'` through `U h`.
                let by_recurrent = rows(&self.gates, step).narrow(1, width, 3 * width);
                through_next = to_previous.addmm_(&by_recurrent, &self.state_weights);
            }
        }
        let by_input = self.gates.narrow(1, 0, 3 * width);
        let by_recurrent = self.gates.narrow(1, width, 3 * width);
        // Rows `n, r, z` become `r, z, n` again.
        let restore_order = |rows: Tensor| rows.roll([-width], [0]);
        let biases = self.gates.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        // The states before the first step are zero and contribute nothing to the gradient of `U`.
        let n_first = self.steps.first().map_or(0, len);
        let previous: Vec<Tensor> =
            (1..self.steps.len()).filter_map(|step| self.previous_states(states, step)).collect();
        let state_weights = if previous.is_empty() {
            self.state_weights.zeros_like()
        } else {
            by_recurrent.slice(0, n_first, None, 1).tr().matmul(&Tensor::cat(&previous, 0))
        };
        vec![
            by_input.matmul(&self.input_weights),
            restore_order(by_input.tr().matmul(&self.x)),
            state_weights,
            restore_order(biases.narrow(0, 0, 3 * width)),
            biases.narrow(0, width, 3 * width),
        ]
    }

    /// The states of the previous step, of the sessions that have this step; `None` at the first.
    fn previous_states(&self, states: &Tensor, step: usize) -> Option<Tensor> {
        let previous = &self.steps[step.checked_sub(1)?];
        Some(states.narrow(0, previous.start, len(&self.steps[step])))
    }
}

fn len(step: &Range<i64>) -> i64 {
    step.end - step.start
}

fn rows(matrix: &Tensor, step: &Range<i64>) -> Tensor {
    matrix.narrow(0, step.start, len(step))
}

/// The positions of a step. The first three quarters of `gates` hold `W x + b`.
struct ForwardStep<'a> {
    width: usize,
    gates: &'a mut [f32],
    /// `U h + c`.
    recurrent: &'a [f32],
    /// `h`; empty if all are zero.
    previous: &'a [f32],
    states: &'a mut [f32],
}

impl Loop for ForwardStep<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        let width = self.width;
        let zeros = vec![0.0; width];
        let positions =
            self.gates.chunks_exact_mut(4 * width).zip(self.recurrent.chunks_exact(3 * width));
        for (position, ((gates, recurrent), states)) in
            positions.zip(self.states.chunks_exact_mut(width)).enumerate()
        {
            let previous =
                self.previous.get(position * width..(position + 1) * width).unwrap_or(&zeros);
            let [n, r, z, recurrent_n] = quarters(gates, width);
            let (recurrent, new_recurrent_n) = recurrent.split_at(2 * width);
            let (recurrent_r, recurrent_z) = recurrent.split_at(width);
            for i in 0..width {
                r[i] = sigmoid::<FUSES>(r[i] + recurrent_r[i]);
                z[i] = sigmoid::<FUSES>(z[i] + recurrent_z[i]);
                recurrent_n[i] = new_recurrent_n[i];
                n[i] = tanh::<FUSES>(n[i] + r[i] * recurrent_n[i]);
                states[i] = n[i] + z[i] * (previous[i] - n[i]);
            }
        }
    }
}

/// The positions of a step in the backward pass, which replaces `gates` by their gradients.
struct BackwardStep<'a> {
    width: usize,
    gates: &'a mut [f32],
    /// Gradients of the states as outputs of the layer.
    gradients: &'a [f32],
    /// Gradients of the states through the next step, for the sessions that have one. These are the
    /// first of this step.
    through_next: &'a [f32],
    /// `h`; empty if all are zero.
    previous: &'a [f32],
    /// Gradients of `h`, without the part through `U h`.
    to_previous: &'a mut [f32],
}

impl Loop for BackwardStep<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        let width = self.width;
        let zeros = vec![0.0; width];
        let positions =
            self.gates.chunks_exact_mut(4 * width).zip(self.gradients.chunks_exact(width));
        for (position, ((gates, gradients), to_previous)) in
            positions.zip(self.to_previous.chunks_exact_mut(width)).enumerate()
        {
            let row = position * width..(position + 1) * width;
            let previous = self.previous.get(row.clone()).unwrap_or(&zeros);
            let through_next = self.through_next.get(row).unwrap_or(&zeros);
            let [n, r, z, recurrent_n] = quarters(gates, width);
            for i in 0..width {
                let gradient = gradients[i] + through_next[i];
                // Derivatives before the nonlinearities: tanh' = 1 − n², σ' = σ (1 − σ).
                let by_n = gradient * (1.0 - z[i]) * (1.0 - n[i] * n[i]);
                let by_z = gradient * (previous[i] - n[i]) * z[i] * (1.0 - z[i]);
                to_previous[i] = gradient * z[i];
                n[i] = by_n;
                z[i] = by_z;
                let gate = r[i];
                r[i] = by_n * recurrent_n[i] * gate * (1.0 - gate);
                recurrent_n[i] = by_n * gate;
            }
        }
    }
}

/// The four parts of a row of gates.
#[inline(always)]
fn quarters(row: &mut [f32], width: usize) -> [&mut [f32]; 4] {
    let (first, last) = row.split_at_mut(2 * width);
    let ((a, b), (c, d)) = (first.split_at_mut(width), last.split_at_mut(width));
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Packed positions, and a layer of width 20 over vectors of 12 numbers.
    fn example(n_sessions: &[i64]) -> (Tensor, Vec<Tensor>) {
        let wave = |size: &[i64], frequency: f64| {
            let n: i64 = size.iter().product();
            let angles = Tensor::arange(n, (Kind::Float, Device::Cpu)) * frequency;
            angles.sin().view(size).set_requires_grad(true)
        };
        let x = wave(&[n_sessions.iter().sum(), 12], 0.9);
        let sizes = [&[60, 12][..], &[60, 20], &[60], &[60]];
        (
            x,
            sizes
                .into_iter()
                .zip([0.7, 1.1, 1.7, 2.3])
                .map(|(size, frequency)| wave(size, frequency))
                .collect(),
        )
    }

    fn libtorch_states(x: &Tensor, n_sessions: &[i64], layer: &[&Tensor]) -> Tensor {
        let h0 = Tensor::zeros([1, n_sessions[0], 20], (Kind::Float, Device::Cpu));
        let sizes = Tensor::from_slice(n_sessions);
        Tensor::gru_data(x, &sizes, &h0, layer, true, 1, 0.0, true, false).0
    }

    #[test]
    fn states_and_gradients_equal_those_of_libtorch() {
        for n_sessions in [&[5i64, 5, 3, 1, 1][..], &[7], &[1, 1, 1]] {
            let (x, layer) = example(n_sessions);
            let layer: Vec<&Tensor> = layer.iter().collect();
            let gradients = |states: &Tensor| {
                // A different weight for each number, so that swapped numbers change the loss.
                let weights =
                    Tensor::arange(states.numel() as i64, (Kind::Float, Device::Cpu)).sin();
                let loss = (states * weights.view_as(states)).sum(Kind::Float);
                let inputs = [&[&x], &layer[..]].concat();
                Tensor::run_backward(&[loss], &inputs, false, false)
            };
            let ours = gru_layer(&x, n_sessions, &layer);
            let theirs = libtorch_states(&x, n_sessions, &layer);
            assert!(ours.allclose(&theirs, 1e-5, 1e-6, false), "{n_sessions:?}");
            for (number, (ours, theirs)) in
                gradients(&ours).iter().zip(gradients(&theirs)).enumerate()
            {
                assert!(
                    ours.allclose(&theirs, 1e-4, 1e-5, false),
                    "{n_sessions:?}: gradient {number}"
                );
            }
        }
    }

    #[test]
    fn without_autograd_the_states_are_equal_and_need_no_gradient() {
        let (x, layer) = example(&[3, 2]);
        let layer: Vec<&Tensor> = layer.iter().collect();
        let states = tch::no_grad(|| gru_layer(&x, &[3, 2], &layer));
        assert!(!states.requires_grad());
        assert!(states.equal(&gru_layer(&x, &[3, 2], &layer).detach()));
    }
}
