//! The input block, from the columns of an event to one vector: tables, continuous features,
//! aggregation, projection.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use super::item_table::RowRequest;
use super::item_vectors::ItemVectors;
use super::parameters::{LayerNorm, Linear, ParameterBuilder};
use super::rows::take_rows;
use super::{ITEM_TABLE, ItemTable, Parameters};
use crate::collective::CollectiveError;
use crate::config::{Aggregation, Continuous, InputConfig};
use crate::data::plan::derive_seed;
use crate::data::{Batch, Features};

impl InputConfig {
    /// Width of a column's channel; `None` if the column shares a projection with others.
    fn column_width(&self, features: &Features, column: usize) -> Option<i64> {
        match (column, features.columns()[column].is_categorical(), self.continuous) {
            (0, ..) => Some(self.item_width),
            (_, true, _) => Some(self.feature_width),
            (_, _, Continuous::Raw {}) => Some(1),
            (_, _, Continuous::SoftOneHot { width, .. }) => Some(width),
            (_, _, Continuous::Projected { .. }) => None,
        }
    }

    /// Width of the aggregated features of an event.
    ///
    /// # Errors
    /// Features of different widths cannot be summed.
    pub(super) fn aggregated_width(&self, features: &Features) -> Result<i64, String> {
        let columns = features.columns();
        let mut widths: Vec<(&str, i64)> = (0..columns.len())
            .filter_map(|column| {
                Some((columns[column].name.as_str(), self.column_width(features, column)?))
            })
            .collect();
        if let Continuous::Projected { width } = self.continuous
            && widths.len() < columns.len()
        {
            widths.push(("continuous", width));
        }
        if self.aggregation == Aggregation::Concat {
            return Ok(widths.iter().map(|(_, width)| width).sum());
        }
        match widths.iter().find(|(_, width)| *width != self.item_width) {
            None => Ok(self.item_width),
            Some((name, width)) => Err(format!(
                "`model.input.aggregation` cannot be `sum`: feature `{name}` has the width \
                 {width}, the item {}",
                self.item_width
            )),
        }
    }
}

/// The vector of one column, or of all continuous columns together, before aggregation.
enum Channel {
    /// A row of the parameter `table`.
    Table { column: usize, table: usize },
    /// [`Continuous::Raw`].
    Value { column: usize },
    /// [`Continuous::Projected`].
    Values { columns: Vec<usize>, projection: Linear },
    /// [`Continuous::SoftOneHot`]; `vectors` is a parameter.
    SoftOneHot { column: usize, mixture: Linear, vectors: usize },
}

/// Events → vectors of the body's width.
pub struct Input {
    aggregation: Aggregation,
    pub(super) swap_noise: f64,
    /// Sorted by name, which is the order of concatenation.
    channels: Vec<(Channel, Option<LayerNorm>)>,
    projection: Option<Linear>,
    /// Parameter that replaces hidden events; `None` if the objective hides none.
    mask: Option<usize>,
    to_body: Linear,
}

/// A lookup in one table.
pub(super) struct Lookup<'a> {
    /// Index of the table's parameter.
    pub table: usize,
    /// Row of each event, and of the padding: `[T + 1]`.
    pub rows: Tensor,
    /// Values of these rows, `[T + 1, D]`.
    pub vectors: Tensor,
    pub request: RowRequest<'a>,
}

impl Input {
    /// Declares a table for every categorical feature except the item id, whose table comes first.
    pub(super) fn declare_tables(
        config: &InputConfig,
        features: &Features,
        builder: &mut ParameterBuilder,
    ) {
        for feature in &features.columns()[1..] {
            if let Some(n_rows) = feature.cardinality().filter(|_| feature.is_categorical()) {
                let name = format!("tables.{}.weight", feature.name);
                builder.normal(name, &[n_rows, config.feature_width], config.init_std);
            }
        }
    }

    /// Declares all other parameters. `first_table`: the first that [`Input::declare_tables`]
    /// declared. `masks`: whether the objective hides events.
    ///
    /// # Errors
    /// Features of different widths cannot be summed.
    pub(super) fn declare(
        config: &InputConfig,
        features: &Features,
        first_table: usize,
        masks: bool,
        body_width: i64,
        builder: &mut ParameterBuilder,
    ) -> Result<Self, String> {
        let columns = features.columns();
        let continuous: Vec<usize> =
            (0..columns.len()).filter(|&i| !columns[i].is_categorical()).collect();
        let mut tables = first_table..;
        // (name, width, channel)
        let mut channels: Vec<(&str, i64, Channel)> = Vec::new();
        for (column, feature) in columns.iter().enumerate() {
            let name = feature.name.as_str();
            let Some(width) = config.column_width(features, column) else { continue };
            let channel = if column == 0 {
                Channel::Table { column, table: ITEM_TABLE }
            } else if feature.is_categorical() {
                Channel::Table { column, table: tables.next().expect("endless") }
            } else if let Continuous::SoftOneHot { n_vectors, .. } = config.continuous {
                let mixture = builder.linear(&format!("input.{name}.mixture"), 1, n_vectors);
                let vectors = format!("input.{name}.vectors");
                let vectors = builder.normal(vectors, &[n_vectors, width], config.init_std);
                Channel::SoftOneHot { column, mixture, vectors }
            } else {
                Channel::Value { column }
            };
            channels.push((name, width, channel));
        }
        if let Continuous::Projected { width } = config.continuous
            && !continuous.is_empty()
        {
            let projection = builder.linear("input.continuous", continuous.len() as i64, width);
            channels.push((
                "continuous",
                width,
                Channel::Values { columns: continuous, projection },
            ));
        }
        channels.sort_by_key(|(name, ..)| *name);

        let width = config.aggregated_width(features)?;
        let channels = channels
            .into_iter()
            .map(|(name, width, channel)| {
                // The layer norm of a single number is a constant.
                let norm = (config.layer_norm && width > 1)
                    .then(|| builder.layer_norm(&format!("input.{name}.layer_norm"), width, 1e-5));
                (channel, norm)
            })
            .collect();
        let projection = config
            .projection_width
            .map(|projected| builder.linear("input.projection", width, projected));
        let width = config.projection_width.unwrap_or(width);
        let mask = masks.then(|| builder.normal("input.mask", &[width], 0.001));
        let to_body = builder.linear("input.to_body", width, body_width);
        let &InputConfig { aggregation, swap_noise, .. } = config;
        Ok(Self { aggregation, swap_noise, channels, projection, mask, to_body })
    }

    /// *All ranks*, if the item table is sharded. Looks up the vectors of the categorical columns,
    /// in the order of the channels. `is_sized`: whether all ranks look up the same number of rows.
    ///
    /// # Errors
    /// A collective call fails.
    pub(super) fn look_up<'a>(
        &self,
        items: &ItemVectors<'_>,
        columns: &[Tensor],
        item_table: &ItemTable<'a>,
        is_sized: bool,
    ) -> Result<Vec<Lookup<'a>>, CollectiveError> {
        let tables = self.channels.iter().filter_map(|(channel, _)| match channel {
            &Channel::Table { column, table } => Some((column, table)),
            _ => None,
        });
        tables
            .map(|(column, table)| {
                let rows = columns[column].shallow_clone();
                let (request, vectors);
                if table == ITEM_TABLE {
                    let counts = item_table.gather_counts(rows.size()[0], is_sized)?;
                    request = item_table.request(&rows, &counts)?;
                    vectors = request.fetch(|rows| items.vectors(rows))?;
                } else {
                    request = RowRequest::replicated(&rows);
                    let weights = items.parameters.leaf(table).detach();
                    vectors = weights.index_select(0, &rows);
                }
                Ok(Lookup { table, rows, vectors: vectors.to_kind(Kind::Float), request })
            })
            .collect()
    }

    /// The vectors of all positions, `[P, body_width]`, and the mask vector, `[1, body_width]`.
    /// `looked_up`: vectors of [`Input::look_up`]; `input_rows`: see [`super::Layout`].
    pub(super) fn positions(
        &self,
        parameters: &Parameters,
        columns: &[Tensor],
        looked_up: &[Tensor],
        input_rows: &Tensor,
    ) -> (Tensor, Option<Tensor>) {
        let mut looked_up = looked_up.iter();
        let channels: Vec<Tensor> = self
            .channels
            .iter()
            .map(|(channel, norm)| {
                let value = |column: usize| columns[column].to_kind(Kind::Float).unsqueeze(1);
                let vectors = match channel {
                    Channel::Table { .. } => {
                        looked_up.next().expect("every table is looked up").shallow_clone()
                    }
                    Channel::Value { column } => value(*column),
                    Channel::Values { columns, projection } => {
                        let values: Vec<Tensor> =
                            columns.iter().map(|&column| value(column)).collect();
                        projection.apply(parameters, &Tensor::cat(&values, 1)).relu()
                    }
                    Channel::SoftOneHot { column, mixture, vectors } => mixture
                        .apply(parameters, &value(*column))
                        .softmax(1, Kind::Float)
                        .matmul(parameters.leaf(*vectors)),
                };
                norm.map_or(vectors.shallow_clone(), |norm| norm.apply(parameters, &vectors))
            })
            .collect();
        let mut events = match self.aggregation {
            Aggregation::Concat if channels.len() == 1 => channels[0].shallow_clone(),
            Aggregation::Concat => Tensor::cat(&channels, 1),
            Aggregation::Sum => {
                channels[1..].iter().fold(channels[0].shallow_clone(), |sum, x| sum + x)
            }
        };
        if let Some(projection) = self.projection {
            events = projection.apply(parameters, &events).relu();
        }
        // Row `T` is the padding event, row `T + 1` the mask.
        if let Some(mask) = self.mask {
            events = Tensor::cat(&[events, parameters.leaf(mask).unsqueeze(0)], 0);
        }
        let vectors = self.to_body.apply(parameters, &events).relu();
        let mask = self.mask.map(|_| vectors.narrow(0, -1, 1));
        (take_rows(&vectors, input_rows), mask)
    }
}

/// The event from which each event takes its value of a column: itself, or with `probability` a
/// random event of its micro-batch.
pub(super) fn swap_sources(batch: &Batch, column: usize, probability: f64) -> Vec<i64> {
    let events = batch.by_segment(&batch.lengths);
    let mut sources = Vec::with_capacity(batch.n_events());
    for (segment, n) in batch.segments.iter().zip(events) {
        let (first, n) = (sources.len() as i64, n as i64);
        let mut generator =
            ChaCha8Rng::seed_from_u64(derive_seed(segment.seed, "swap noise", &[column as u64]));
        sources.extend((first..first + n).map(|event| {
            if generator.random_bool(probability) {
                generator.random_range(first..first + n)
            } else {
                event
            }
        }));
    }
    sources
}
