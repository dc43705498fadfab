//! A layer of a GRU on a CPU (Cho et al. 2014), as cuDNN and libtorch define it: with the gates of each position
//! `r, z = σ(W x + b + U h + c)` and `n = tanh(W x + b + r (U h + c))`, the state is `h' = (1 − z) n + z h`.
//!
//! A step of it is a product of matrices and one loop over its numbers, as is a step back; libtorch goes through some ten
//! operations, and 25 back, each over a few thousand numbers, which take their time to start. Numbers of a position lie in one
//! row `n, r, z, U_n h`, and so do their gradients afterwards: those by `W x` are then its first three quarters, those by `U h`
//! its last three.

use std::ops::Range;

use tch::{Kind, Tensor};

use crate::device::host::numbers;
use crate::device::operation::follows;
use crate::device::vectors::{self, Loop, sigmoid, tanh};

/// The positions `x: [P, D]` of sessions step by step, the `n_sessions` of each step never more than those of the one before →
/// their states `[P, H]`. The layer is `[W: [3H, D], U: [3H, H], b: [3H], c: [3H]]`, rows in the order `r, z, n`. All is f32 and
/// on the CPU.
pub(super) fn recurrence(x: &Tensor, n_sessions: &[i64], layer: &[&Tensor]) -> Tensor {
    let &[of_input, of_state, input_bias, state_bias] = layer else { panic!("a layer has four parameters") };
    let (n_positions, width) = (x.size()[0], of_state.size()[1]);
    let mut first = 0;
    let steps: Vec<Range<i64>> = n_sessions
        .iter()
        .map(|&n| {
            first += n;
            first - n..first
        })
        .collect();
    let (states, walk) = tch::no_grad(|| {
        // Rows `r, z, n` become `n, r, z`.
        let of_input = of_input.roll([width], [0]);
        let gates = x.new_empty([n_positions, 4 * width], (Kind::Float, x.device()));
        let inputs = input_bias.roll([width], [0]).addmm(x, &of_input.tr());
        gates.narrow(1, 0, 3 * width).copy_(&inputs);
        let states = x.new_empty([n_positions, width], (Kind::Float, x.device()));
        let walk = Walk { steps, x: x.detach(), of_input, of_state: of_state.detach(), gates, width };
        walk.forward(&states, state_bias);
        (states, walk)
    });
    let kept = states.shallow_clone();
    follows(states, &[x, of_input, of_state, input_bias, state_bias], move |gradient| {
        walk.back(&kept, gradient)
    })
}

/// What is kept to go back.
struct Walk {
    /// Positions of each step.
    steps: Vec<Range<i64>>,
    x: Tensor,
    /// `W`, rows in the order `n, r, z`.
    of_input: Tensor,
    /// `U`.
    of_state: Tensor,
    /// `[P, 4H]`.
    gates: Tensor,
    /// `H`.
    width: i64,
}

impl Walk {
    fn forward(&self, states: &Tensor, bias: &Tensor) {
        for (number, step) in self.steps.iter().enumerate() {
            let mut before = self.before(states, number);
            let mut recurrent = match &before {
                Some(before) => bias.addmm(before, &self.of_state.tr()),
                None => bias.expand([len(step), -1], false).contiguous(),
            };
            vectors::run(Forward {
                width: self.width as usize,
                gates: numbers(&mut rows(&self.gates, step)),
                recurrent: numbers(&mut recurrent),
                before: before.as_mut().map_or(&[], |before| numbers(before)),
                states: numbers(&mut rows(states, step)),
            });
        }
    }

    /// From the gradient of the states to those of `x`, `W`, `U`, `b` and `c`.
    fn back(self, states: &Tensor, gradient: Tensor) -> Vec<Tensor> {
        let width = self.width;
        let gradient = gradient.contiguous();
        // Of the states of a step by what follows them.
        let mut later = gradient.narrow(0, 0, 0);
        for (number, step) in self.steps.iter().enumerate().rev() {
            let mut before = self.before(states, number);
            let mut carried = gradient.new_empty([len(step), width], (Kind::Float, gradient.device()));
            vectors::run(Backward {
                width: width as usize,
                gates: numbers(&mut rows(&self.gates, step)),
                gradients: numbers(&mut rows(&gradient, step)),
                later: numbers(&mut later),
                before: before.as_mut().map_or(&[], |before| numbers(before)),
                carried: numbers(&mut carried),
            });
            if number > 0 {
                later = carried.addmm_(&rows(&self.gates, step).narrow(1, width, 3 * width), &self.of_state);
            }
        }
        let (by_input, by_state) =
            (self.gates.narrow(1, 0, 3 * width), self.gates.narrow(1, width, 3 * width));
        let in_order = |rows: Tensor| rows.roll([-width], [0]);
        let biases = self.gates.sum_dim_intlist([0i64].as_slice(), false, Kind::Float);
        // Nothing is before the first step.
        let n_first = self.steps.first().map_or(0, len);
        let befores: Vec<Tensor> =
            (1..self.steps.len()).filter_map(|step| self.before(states, step)).collect();
        let of_state = match befores.is_empty() {
            true => self.of_state.zeros_like(),
            false => by_state.slice(0, n_first, None, 1).tr().matmul(&Tensor::cat(&befores, 0)),
        };
        vec![
            by_input.matmul(&self.of_input),
            in_order(by_input.tr().matmul(&self.x)),
            of_state,
            in_order(biases.narrow(0, 0, 3 * width)),
            biases.narrow(0, width, 3 * width),
        ]
    }

    /// The states before those of a step; none before the first.
    fn before(&self, states: &Tensor, step: usize) -> Option<Tensor> {
        let earlier = &self.steps[step.checked_sub(1)?];
        Some(states.narrow(0, earlier.start, len(&self.steps[step])))
    }
}

fn len(step: &Range<i64>) -> i64 {
    step.end - step.start
}

fn rows(of: &Tensor, step: &Range<i64>) -> Tensor {
    of.narrow(0, step.start, len(step))
}

/// A step: `gates` hold `W x + b` in their first three quarters.
struct Forward<'a> {
    width: usize,
    gates: &'a mut [f32],
    /// `U h + c`.
    recurrent: &'a [f32],
    /// Nothing if all are zero.
    before: &'a [f32],
    states: &'a mut [f32],
}

impl Loop for Forward<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        let width = self.width;
        let zeros = vec![0.0; width];
        let positions = self.gates.chunks_exact_mut(4 * width).zip(self.recurrent.chunks_exact(3 * width));
        for (place, ((gates, recurrent), states)) in
            positions.zip(self.states.chunks_exact_mut(width)).enumerate()
        {
            let before = self.before.get(place * width..(place + 1) * width).unwrap_or(&zeros);
            let [n, r, z, of_n] = quarters(gates, width);
            let (recurrent, of_state) = recurrent.split_at(2 * width);
            let (of_r, of_z) = recurrent.split_at(width);
            for i in 0..width {
                r[i] = sigmoid::<FUSES>(r[i] + of_r[i]);
                z[i] = sigmoid::<FUSES>(z[i] + of_z[i]);
                of_n[i] = of_state[i];
                n[i] = tanh::<FUSES>(n[i] + r[i] * of_n[i]);
                states[i] = n[i] + z[i] * (before[i] - n[i]);
            }
        }
    }
}

/// A step back: `gates` become their gradients.
struct Backward<'a> {
    width: usize,
    gates: &'a mut [f32],
    /// Of the states, but for what follows them.
    gradients: &'a [f32],
    /// By what follows them, of as many as have something that does.
    later: &'a [f32],
    /// Nothing if all are zero.
    before: &'a [f32],
    /// By the states before, but for what goes through `U`.
    carried: &'a mut [f32],
}

impl Loop for Backward<'_> {
    #[inline(always)]
    fn run<const FUSES: bool>(self) {
        let width = self.width;
        let zeros = vec![0.0; width];
        let positions = self.gates.chunks_exact_mut(4 * width).zip(self.gradients.chunks_exact(width));
        for (place, ((gates, gradients), carried)) in
            positions.zip(self.carried.chunks_exact_mut(width)).enumerate()
        {
            let own = place * width..(place + 1) * width;
            let before = self.before.get(own.clone()).unwrap_or(&zeros);
            let later = self.later.get(own).unwrap_or(&zeros);
            let [n, r, z, of_n] = quarters(gates, width);
            for i in 0..width {
                let gradient = gradients[i] + later[i];
                let by_n = gradient * (1.0 - z[i]) * (1.0 - n[i] * n[i]);
                let by_z = gradient * (before[i] - n[i]) * z[i] * (1.0 - z[i]);
                carried[i] = gradient * z[i];
                n[i] = by_n;
                z[i] = by_z;
                let gate = r[i];
                r[i] = by_n * of_n[i] * gate * (1.0 - gate);
                of_n[i] = by_n * gate;
            }
        }
    }
}

/// The four parts of a row.
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
    use crate::data::with_seed;

    /// Sessions by step, positions, and a layer of width 20 over vectors of 12 numbers.
    fn example(n_sessions: &[i64]) -> (Tensor, Vec<Tensor>) {
        let random = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
        with_seed(3, || {
            let x = random(&[n_sessions.iter().sum(), 12]);
            (x, [&[60, 12][..], &[60, 20], &[60], &[60]].map(random).into())
        })
    }

    fn of_libtorch(x: &Tensor, n_sessions: &[i64], layer: &[&Tensor]) -> Tensor {
        let h0 = Tensor::zeros([1, n_sessions[0], 20], (Kind::Float, Device::Cpu));
        let sizes = Tensor::from_slice(n_sessions);
        Tensor::gru_data(x, &sizes, &h0, layer, true, 1, 0.0, true, false).0
    }

    #[test]
    fn states_and_gradients_are_those_of_libtorch() {
        for n_sessions in [&[5i64, 5, 3, 1, 1][..], &[7], &[1, 1, 1]] {
            let (x, layer) = example(n_sessions);
            let layer: Vec<&Tensor> = layer.iter().collect();
            let of = |states: &Tensor| {
                // Every number counts otherwise.
                let weights = Tensor::arange(states.numel() as i64, (Kind::Float, Device::Cpu)).sin();
                let loss = (states * weights.view_as(states)).sum(Kind::Float);
                let learnt = [&[&x], &layer[..]].concat();
                Tensor::run_backward(&[loss], &learnt, false, false)
            };
            let (ours, theirs) = (recurrence(&x, n_sessions, &layer), of_libtorch(&x, n_sessions, &layer));
            assert!(ours.allclose(&theirs, 1e-5, 1e-6, false), "{n_sessions:?}");
            for (number, (ours, theirs)) in of(&ours).iter().zip(of(&theirs)).enumerate() {
                assert!(ours.allclose(&theirs, 1e-4, 1e-5, false), "{n_sessions:?}: gradient {number}");
            }
        }
    }

    #[test]
    fn nothing_is_kept_where_nothing_is_learnt() {
        let (x, layer) = example(&[3, 2]);
        let layer: Vec<&Tensor> = layer.iter().collect();
        let states = tch::no_grad(|| recurrence(&x, &[3, 2], &layer));
        assert!(!states.requires_grad());
        assert!(states.equal(&recurrence(&x, &[3, 2], &layer).detach()));
    }
}
