//! Compares a lower bound of the memory that a run needs with the available memory before the run
//! starts.
//!
//! A rank has the values, the gradients and the optimizer state of all parameters, all f32. The
//! state is two moments per parameter, or one sum for tables that are trained with Adagrad.
//! Fixed-point sums take another 8 bytes per parameter. Of a sharded item table a rank has its rows
//! only. The rank that writes checkpoints also has a copy of the values and the state. Of the
//! scores, those of one session are counted; activations and batches are not.

use std::collections::BTreeMap;

use bireme_base::user_error::{REFUSED, UserError};
use tch::Device;

use super::{RankContext, TrainError, item_table};
use crate::collective::host_name;
use crate::config::{Config, Reduction, TableLayout};
use crate::data::Features;
use crate::device::memory::{self, Available, format_bytes};
use crate::model::{ItemTable, ModelConfig, Neural, ParameterSizes};
use crate::optim::TableOptimizer;

/// Purpose of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Training, with checkpoints.
    Train,
    /// Evaluation or import.
    Read,
}

/// The model does not fit into memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{who} {} of memory, {} are {}: {largest}",
    format_bytes(*needed),
    format_bytes(u128::from(available.bytes)),
    available.what
)]
pub struct NotEnoughMemory {
    /// Subject and verb of the message, such as `this rank needs at least`.
    who: String,
    needed: u128,
    available: Available,
    /// Description of the largest part.
    largest: String,
    hint: &'static str,
}

impl UserError for NotEnoughMemory {
    fn exit_code(&self) -> i32 {
        REFUSED
    }

    fn hint(&self) -> Option<String> {
        Some(self.hint.to_owned())
    }
}

/// Bytes that a rank needs at least.
#[derive(Debug, Default)]
struct MemoryNeed {
    host: u128,
    /// Memory of the GPU.
    device: u128,
    /// Description of the largest part.
    largest: String,
    hint: &'static str,
}

/// *All ranks.* Checks that the model of `config` fits into the memory of this rank's host,
/// together with those of the other ranks on the host, and into the memory of its GPU.
/// `n_sessions`: number of sessions of the data, if known.
///
/// # Errors
/// The model does not fit, or the configuration does not fit the features. Ranks may return
/// different results.
pub fn check_memory(
    config: &Config,
    features: &Features,
    place: RankContext<'_>,
    purpose: Purpose,
    n_sessions: Option<usize>,
) -> Result<(), TrainError> {
    let collective = place.collective;
    let item_table = item_table(config, features.n_items(), collective);
    let is_writer = purpose == Purpose::Train && collective.root().is_some();
    // A rank with an error must take part in the exchange too, so the error is returned after it.
    let need = MemoryNeed::new(config, features, &item_table, place, is_writer).map(|mut need| {
        if n_sessions.is_some_and(|n| looks_like_raw_ids(features.n_items(), n)) {
            need.hint = RAW_IDS;
        }
        need
    });
    let saturated = |bytes: u128| i64::try_from(bytes).unwrap_or(i64::MAX);
    let on_host = memory::available_on_host();
    let available = on_host.as_ref().map_or(u128::MAX, |available| available.bytes.into());
    let own = [need.as_ref().map_or(0, |need| saturated(need.host)), saturated(available)];
    let all = collective.gather(&own)?;
    let hosts = collective.gather_bytes(host_name().as_bytes())?;
    let need = need.map_err(TrainError::Model)?;

    // Needed and available bytes of the ranks on this host.
    let local_ranks: Vec<&[i64]> = all
        .chunks_exact(2)
        .zip(&hosts)
        .filter(|(_, host)| **host == hosts[collective.rank()])
        .map(|(bytes, _)| bytes)
        .collect();
    let needed: u128 =
        local_ranks.iter().map(|bytes| bytes[0] as u128).sum::<u128>().max(need.host);
    let available = local_ranks.iter().map(|bytes| bytes[1] as u64).min().unwrap_or(u64::MAX);
    let refuse = |who: String, needed, available| {
        let MemoryNeed { largest, hint, .. } = &need;
        Err(NotEnoughMemory { who, needed, available, largest: largest.clone(), hint }.into())
    };
    let this_rank = if collective.world_size() == 1 { "the run" } else { "this rank" };
    let this_rank = || format!("{this_rank} needs at least");
    match on_host {
        Some(Available { what, .. }) if needed > u128::from(available) => {
            let who = match local_ranks.len() {
                1 => this_rank(),
                n => format!("the {n} ranks on {} need at least", host_name()),
            };
            return refuse(who, needed, Available { bytes: available, what });
        }
        _ => {}
    }
    match memory::available_to_process() {
        Some(available) if need.host > u128::from(available.bytes) => {
            return refuse(this_rank(), need.host, available);
        }
        _ => {}
    }
    match memory::available_on_device(place.device) {
        Some(available) if need.device > u128::from(available.bytes) => {
            refuse(this_rank(), need.device, available)
        }
        _ => Ok(()),
    }
}

const RAW_IDS: &str = "the largest item id of `schema.pbtxt` looks like a raw id: `bireme \
                       preprocess` numbers products from 2 on, without gaps";

/// Whether the catalogue is too large for the number of sessions.
fn looks_like_raw_ids(n_items: i64, n_sessions: usize) -> bool {
    n_items > 1 << 20 && n_items as u128 > 1000 * n_sessions as u128
}

impl MemoryNeed {
    fn new(
        config: &Config,
        features: &Features,
        item_table: &ItemTable<'_>,
        place: RankContext<'_>,
        is_writer: bool,
    ) -> Result<Self, String> {
        let n_items = features.n_items() as u128;
        let mut need = match config.model.neural() {
            Some(neural) => {
                Self::for_network(config, neural, features, item_table, place, is_writer)?
            }
            None => {
                // Counts and scores, i64 and f64.
                let bytes_per_item = 16
                    + match config.model {
                        ModelConfig::Recent {} => 8,
                        // An empty `Vec` per item.
                        ModelConfig::Vsknn(_) => 24,
                        _ => 0,
                    };
                Self {
                    host: n_items * bytes_per_item,
                    largest: format!("most is for counts of {n_items} items (`schema.pbtxt`)"),
                    hint: "reduce the number of items, the domain of the item id in `schema.pbtxt`",
                    device: 0,
                }
            }
        };
        // Occurrences, offsets and attributes on the host and in tables. The pairs depend on the
        // sessions.
        if config.model.candidates().is_some() {
            need.host += 64 * n_items;
        }
        // Occurrences in total and in a file, i64.
        need.host += 16 * n_items;
        Ok(need)
    }

    fn for_network(
        config: &Config,
        neural: Neural<'_>,
        features: &Features,
        item_table: &ItemTable<'_>,
        place: RankContext<'_>,
        is_writer: bool,
    ) -> Result<Self, String> {
        let sizes = ParameterSizes::new(&neural, features, config.data.max_length, item_table)?;
        let states_of_tables = match config.train.tables {
            TableOptimizer::Adagrad { momentum: 0.0, .. } => 1,
            _ => 2,
        };
        let (mut values, mut states) = (0, 0);
        let mut by_key: BTreeMap<String, ParameterGroup> = BTreeMap::new();
        for (index, (name, size)) in sizes.named.iter().enumerate() {
            let n: u128 = size.iter().map(|&n| n as u128).product();
            let n_states = if index < sizes.n_tables { states_of_tables } else { 2 };
            values += n;
            states += n * n_states;
            let group = by_key.entry(key_of(name, size, config, neural, features)).or_default();
            group.n += n;
            group.n_copies = 2 + n_states;
            group.is_item_table = ItemTable::is_item_table(name);
        }
        let fixed_point =
            if config.run.reduction == Reduction::Reproducible { 8 * values } else { 0 };
        let logits = config.run.precision.logits_kind().elt_size_in_bytes() as u128
            * item_table.len() as u128;
        let trained = 4 * (2 * values + states) + fixed_point + logits;
        let copied =
            if is_writer && item_table.ranks().is_none() { 4 * (values + states) } else { 0 };
        let (host, device) = match place.device {
            Device::Cpu => (trained + copied, 0),
            // Initial values are drawn in host memory.
            _ => (copied.max(4 * values), trained),
        };
        let largest = by_key.into_iter().max_by_key(|(_, group)| group.n);
        let Some((key, ParameterGroup { n, n_copies, is_item_table })) = largest else {
            return Ok(Self::default());
        };
        let is_divisible =
            is_item_table && !item_table.is_sharded() && place.collective.world_size() > 1;
        let largest = format!(
            "most is for {key}, {} times {n_copies} (values, gradient, optimizer)",
            format_bytes(4 * n)
        );
        let hint = if is_divisible {
            "`parallel.item_table = \"sharded\"` divides the item table among the ranks"
        } else {
            "lower these values"
        };
        Ok(Self { host, device, largest, hint })
    }
}

/// Parameters whose sizes depend on the same configuration keys.
#[derive(Default)]
struct ParameterGroup {
    /// Number of elements.
    n: u128,
    /// Number of arrays of that size: values, gradients, states of the optimizer.
    n_copies: u128,
    is_item_table: bool,
}

/// Describes a parameter by the configuration keys that determine its size.
fn key_of(
    name: &str,
    size: &[i64],
    config: &Config,
    neural: Neural<'_>,
    features: &Features,
) -> String {
    let input = neural.input();
    let (width_key, n_layers) = match neural {
        Neural::Gru(gru) => ("hidden_width", gru.n_layers),
        Neural::Xlnet(xlnet) => ("width", xlnet.n_layers),
    };
    let width = neural.width();
    if ItemTable::is_item_table(name) {
        let (n_items, item_width) = (features.n_items(), input.item_width);
        let part = match config.parallel.item_table {
            TableLayout::Sharded => format!("{} rows of ", size[0]),
            TableLayout::Replicated => String::new(),
        };
        return format!(
            "{part}the item table of {n_items} items (`schema.pbtxt`) by `model.input.item_width` \
             {item_width}"
        );
    }
    if let Some(table) = name.strip_prefix("tables.") {
        let (feature, rows) = (table.trim_end_matches(".weight"), size[0]);
        let feature_width = input.feature_width;
        return format!(
            "the table of {rows} values of `{feature}` (`schema.pbtxt`) by \
             `model.input.feature_width` {feature_width}"
        );
    }
    if name.starts_with("gru.") || name.starts_with("xlnet.") {
        return format!("`model.n_layers` {n_layers} of `model.{width_key}` {width}");
    }
    match input.projection_width {
        Some(projection_width) if name.starts_with("input.") => {
            format!("`model.input.projection_width` {projection_width}")
        }
        _ if name.starts_with("input.") && !name.starts_with("input.to_body") => {
            "`model.input.continuous`".to_owned()
        }
        _ => format!("`model.{width_key}` {width}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalogue_much_larger_than_the_sessions_looks_like_raw_ids() {
        assert!(looks_like_raw_ids(1 << 40, 1000));
        assert!(!looks_like_raw_ids(10_000_000, 100_000));
        assert!(!looks_like_raw_ids(1000, 0));
    }
}
