//! A neural next-item model: item table, body, softmax tied to the table.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::head::{CrossEntropy, cross_entropy};
use super::{Gru, GruConfig, Parameters, Recommender};
use crate::data::{Batch, Noise, with_seed};

/// The item table is parameter 0, the bias of its scores parameter 1; the body follows.
const ITEM_TABLE: usize = 0;
const ITEM_BIAS: usize = 1;

/// Loss of a pass, as a sum: division comes last, over all ranks.
pub struct LossSum {
    /// Summed cross entropy, scalar f64 on the device.
    pub loss: Tensor,
    /// Number of targets.
    pub n_targets: usize,
}

/// A model with its parameters.
pub struct Network {
    parameters: Parameters,
    body: Gru,
    n_items: i64,
}

impl Network {
    /// Draws initial parameters; the same on every rank for the same `seed`.
    pub fn new(config: &GruConfig, n_items: i64, seed: u64, device: Device) -> Self {
        let (initial, body) = with_seed(seed, Device::Cpu, || {
            let cpu = (Kind::Float, Device::Cpu);
            let table = Tensor::randn([n_items, config.item_width], cpu) * config.item_init_std;
            let mut initial = vec![
                ("item_table.weight".to_owned(), table),
                ("item_table.bias".to_owned(), Tensor::zeros([n_items], cpu)),
            ];
            let body = Gru::declare(config, &mut initial);
            (initial, body)
        });
        Self { parameters: Parameters::new(initial, device), body, n_items }
    }

    /// The parameters.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// The parameters, to be changed by an optimizer or a checkpoint.
    pub fn parameters_mut(&mut self) -> &mut Parameters {
        &mut self.parameters
    }

    /// Adds the gradients of a pass over `batch` and returns its loss: every event is the target of the state
    /// after those before it. A batch without sessions gives zeros.
    ///
    /// `max_logits` bounds the logits held at once, see [`cross_entropy`].
    pub fn backward(&mut self, batch: &Batch, noise: &mut Noise<'_>, max_logits: i64) -> LossSum {
        let device = batch.items().device();
        if batch.n_next_items == 0 {
            return LossSum { loss: Tensor::zeros([], (Kind::Double, device)), n_targets: 0 };
        }
        let items = batch.items();
        let length = items.size()[1];
        let (context, next) = (items.narrow(1, 0, length - 1), items.narrow(1, 1, length - 1));
        let positions = next.reshape([-1]).nonzero().squeeze_dim(1);
        let targets = next.reshape([-1]).index_select(0, &positions);

        let table = self.parameters.leaf(ITEM_TABLE).detach();
        let vectors = lookup(&table, &context).set_requires_grad(true);
        let states = self.body.states(&self.parameters, &vectors, Some(noise));
        let states = states.reshape([-1, states.size()[2]]).index_select(0, &positions);
        let sessions = self.body.session_vectors(&self.parameters, &states);

        let mut table_gradient = self.parameters.gradient(ITEM_TABLE);
        let CrossEntropy { loss, state_gradient } = tch::no_grad(|| {
            cross_entropy(
                &sessions.detach(),
                &targets,
                (&table, &self.parameters.leaf(ITEM_BIAS).detach()),
                (&mut table_gradient, &mut self.parameters.gradient(ITEM_BIAS)),
                max_logits,
            )
        });

        let body = self.body.range();
        let surrogate = (&sessions * &state_gradient).sum(Kind::Float);
        let inputs: Vec<&Tensor> =
            body.clone().map(|i| self.parameters.leaf(i)).chain(std::iter::once(&vectors)).collect();
        let gradients = Tensor::run_backward(&[surrogate], &inputs, false, false);
        tch::no_grad(|| {
            for (index, gradient) in body.zip(&gradients) {
                let _ = self.parameters.gradient(index).g_add_(gradient);
            }
            // The padding row is read but never learnt from reading it.
            let read = gradients[gradients.len() - 1].reshape([-1, table.size()[1]]);
            let read = read * context.reshape([-1, 1]).ne(0).to_kind(Kind::Float);
            let _ = table_gradient.index_add_(0, &context.reshape([-1]), &read);
        });
        LossSum { loss, n_targets: batch.n_next_items }
    }
}

/// Rows of the item table: `[V, D]`, `[B, L]` → `[B, L, D]`.
fn lookup(table: &Tensor, items: &Tensor) -> Tensor {
    let (n_sessions, length) = items.size2().expect("item indices are [B, L]");
    table.index_select(0, &items.reshape([-1])).view([n_sessions, length, -1])
}

impl Recommender for Network {
    fn n_items(&self) -> i64 {
        self.n_items
    }

    fn device(&self) -> Device {
        self.parameters.values().device()
    }

    fn scores_are_logits(&self) -> bool {
        true
    }

    fn encode(&self, known: &Batch) -> Tensor {
        tch::no_grad(|| {
            let vectors = lookup(self.parameters.leaf(ITEM_TABLE), known.items());
            let states = self.body.states(&self.parameters, &vectors, None);
            let width = states.size()[2];
            let last = (&known.lengths - 1).view([-1, 1, 1]).expand([-1, 1, width], false);
            let last = states.gather(1, &last, false).squeeze_dim(1);
            self.body.session_vectors(&self.parameters, &last)
        })
    }

    fn scores(&self, encoded: &Tensor, items: Range<i64>) -> Tensor {
        tch::no_grad(|| {
            let rows =
                |index: usize| self.parameters.leaf(index).narrow(0, items.start, items.end - items.start);
            rows(ITEM_BIAS).addmm(encoded, &rows(ITEM_TABLE).tr())
        })
    }
}
