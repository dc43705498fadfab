//! From events to the vectors that items are scored against: input block, body, projection.

use tch::{Kind, Tensor};

use super::Objective;
use super::body::{Body, Layout};
use super::input::{Input, Lookup};
use super::item_vectors::normalise;
use super::parameters::{Linear, ParameterBuilder};
use super::prepare::PreparedSessions;
use super::{Gru, Neural, Parameters, Xlnet};
use crate::data::{DropoutGenerator, Features};

/// A model without its tables and its loss. It holds indices of parameters instead of values, so
/// that threads can share it.
pub(super) struct Encoder {
    pub input: Input,
    /// See [`InputConfig::dropout`](crate::config::InputConfig).
    pub input_dropout: f64,
    body: Body,
    /// See [`Objective::two_streams`].
    two_streams: bool,
    /// Width of the states.
    width: i64,
    /// From states to vectors that are scored against items.
    to_item: Linear,
    /// Whether these pass a ReLU.
    relu: bool,
    temperature: f64,
    /// Parameter with the logarithm of the inverse temperature of a cosine head.
    log_scale: Option<usize>,
    /// Length that sessions are padded to where the padding is attended to.
    pub padded_length: Option<usize>,
}

/// The `n` events from `first` on of `x: [T + 1, ..]`, and the padding event: `[n + 1, ..]`.
pub(super) fn rows_of_part(x: &Tensor, first: i64, n: i64) -> Tensor {
    if x.size()[0] == n + 1 {
        x.shallow_clone()
    } else {
        Tensor::cat(&[x.narrow(0, first, n), x.narrow(0, -1, 1)], 0)
    }
}

/// Events of some sessions, with the vectors that were looked up for them.
pub(super) struct EncoderInput {
    /// Values of each feature, `[T + 1]`: see [`Input::columns`].
    pub columns: Vec<Tensor>,
    /// Vectors of each categorical feature, `[T + 1, D]`: see [`Input::look_up`].
    pub vectors: Vec<Tensor>,
}

impl EncoderInput {
    pub fn whole(columns: Vec<Tensor>, lookups: &[Lookup<'_>]) -> Self {
        Self {
            columns,
            vectors: lookups.iter().map(|lookup| lookup.vectors.shallow_clone()).collect(),
        }
    }

    /// The `n` events from `first` on, and the padding event.
    pub fn part(&self, first: i64, n: i64) -> Self {
        let parts = |of: &[Tensor]| of.iter().map(|x| rows_of_part(x, first, n)).collect();
        Self { columns: parts(&self.columns), vectors: parts(&self.vectors) }
    }

    /// Applies dropout to the looked-up vectors. `event_keys`: i32 `[T + 1]`.
    fn with_dropout(&self, p: f64, event_keys: &Tensor, dropout: &mut DropoutGenerator) -> Self {
        let vectors = self.vectors.iter();
        Self {
            columns: self.columns.iter().map(Tensor::shallow_clone).collect(),
            vectors: vectors.map(|x| dropout.dropout(x.shallow_clone(), p, event_keys)).collect(),
        }
    }

    /// Makes the looked-up vectors leaves of the autograd graph: a gradient through the lookup
    /// would be as large as the table.
    pub fn into_leaves(self) -> Self {
        let leaf = |vectors: Tensor| vectors.set_requires_grad(true);
        Self { vectors: self.vectors.into_iter().map(leaf).collect(), ..self }
    }
}

impl Encoder {
    /// Declares the parameters. `first_table`: the first that [`Input::declare_tables`] declared.
    ///
    /// # Errors
    /// A configuration that does not fit the features.
    pub fn declare(
        config: &Neural<'_>,
        features: &Features,
        first_table: usize,
        max_length: usize,
        builder: &mut ParameterBuilder,
    ) -> Result<Self, String> {
        let (input, head, objective) = (config.input(), config.head(), config.objective());
        let width = config.width();
        let masks = objective.masks(matches!(config, Neural::Xlnet(_)));
        let input_block = Input::declare(input, features, first_table, masks, width, builder)?;
        let (body, attends_to_padding) = match config {
            Neural::Gru(gru) => (Body::Gru(Gru::declare(gru, builder)), false),
            Neural::Xlnet(xlnet) => {
                (Body::Xlnet(Xlnet::declare(xlnet, builder)), xlnet.attend_to_padding)
            }
        };
        Ok(Self {
            input: input_block,
            input_dropout: input.dropout,
            body,
            two_streams: objective.two_streams(),
            width,
            to_item: builder.linear("head.projection", width, input.item_width),
            log_scale: head
                .cosine
                .then(|| builder.constant("head.log_scale", &[1], -head.temperature.ln())),
            relu: head.relu,
            temperature: head.temperature,
            padded_length: attends_to_padding.then_some(max_length),
        })
    }

    /// Whether the body is an attention model, or a recurrence.
    pub fn attends(&self) -> bool {
        matches!(self.body, Body::Xlnet(_))
    }

    /// The output states of the prepared plan: `[N, D]`.
    pub fn states(
        &self,
        parameters: &Parameters,
        input: &EncoderInput,
        sessions: &PreparedSessions,
        mut dropout: Option<&mut DropoutGenerator>,
    ) -> Tensor {
        let PreparedSessions { layout, event_keys } = sessions;
        if layout.outputs.numel() == 0 {
            let device = parameters.values().device();
            return Tensor::zeros([0, self.width], (Kind::Float, device));
        }
        match dropout.as_deref_mut().zip(event_keys.as_ref()) {
            Some((generator, keys)) => {
                let input = input.with_dropout(self.input_dropout, keys, generator);
                self.laid_out_states(parameters, &input, layout, dropout)
            }
            None => self.laid_out_states(parameters, input, layout, dropout),
        }
    }

    fn laid_out_states(
        &self,
        parameters: &Parameters,
        input: &EncoderInput,
        layout: &Layout,
        dropout: Option<&mut DropoutGenerator>,
    ) -> Tensor {
        let EncoderInput { columns, vectors } = input;
        let (x, mask) = self.input.positions(parameters, columns, vectors, &layout.input_rows);
        let query = mask.filter(|_| self.two_streams);
        self.body.states(parameters, x, query, layout, dropout)
    }

    /// The states `[B, width]` that the next items of sessions are predicted from. The sessions are
    /// in padded columns `[B, width]`, of `lengths: [B]`. No operation depends on the number of
    /// sessions, so that they can be traced.
    pub fn next_states(
        &self,
        parameters: &Parameters,
        input: &EncoderInput,
        objective: &Objective,
        lengths: &Tensor,
        width: i64,
    ) -> Tensor {
        let padded_length = self.padded_length.map(|length| length as i64);
        let layout = Layout::next(objective, self.attends(), lengths, width, padded_length);
        self.laid_out_states(parameters, input, &layout, None)
    }

    /// States `[N, D]` → vectors `[N, item_width]`; their products with item vectors are scores.
    pub fn vectors(&self, parameters: &Parameters, states: &Tensor) -> Tensor {
        let vectors = self.to_item.apply(parameters, states);
        let vectors = if self.relu { vectors.relu() } else { vectors };
        match self.log_scale {
            Some(log_scale) => normalise(&vectors) * parameters.leaf(log_scale).exp(),
            None if self.temperature == 1.0 => vectors,
            None => vectors / self.temperature,
        }
    }
}
