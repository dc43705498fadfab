//! Memory that a run needs for certain, held against what there is before any of it is taken.
//!
//! For `n` numbers of parameters a rank has their values, their gradients and the optimizer's state (two moments each,
//! of tables that learn by Adagrad one sum), all f32; reproducible sums take 8 bytes each more. Of tables that are
//! sharded it has its rows. The rank that writes checkpoints copies values and state first. Activations, batches and
//! what scores need beyond those of one session come on top, and are not counted.

use std::collections::BTreeMap;

use tch::Device;

use super::{RankContext, TrainError, item_table};
use crate::collective::host_name;
use crate::config::{Config, Reduction, TableLayout};
use crate::data::Features;
use crate::device::memory::{self, Available, in_words};
use crate::model::{ItemTable, ModelConfig, Neural, ParameterSizes};
use crate::optim::TableOptimizer;

/// What a rank makes of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It trains it and writes checkpoints.
    Train,
    /// It reads it.
    Read,
}

/// A rank that needs more than there is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{who} {} of memory, {} are {}: {most}", in_words(*needed), in_words(u128::from(available.bytes)), available.what)]
pub struct NotEnoughMemory {
    /// Who needs it, and `needs` or `need`.
    who: String,
    needed: u128,
    available: Available,
    /// What takes most of it.
    most: String,
    hint: &'static str,
}

impl NotEnoughMemory {
    /// What to change.
    pub fn hint(&self) -> &'static str {
        self.hint
    }
}

/// Bytes that a rank needs at least.
#[derive(Debug, Default)]
struct Need {
    host: u128,
    /// Of a GPU.
    device: u128,
    /// What takes most.
    most: String,
    hint: &'static str,
}

/// *All ranks.* Checks that the model of `config` fits into the memory of this rank's host and GPU, with those of the
/// other ranks there. `n_sessions`: sessions of the data, where they are known.
///
/// # Errors
/// It does not, or the configuration does not fit the features. Ranks may differ in that.
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
    // Every rank takes part in the exchange, whatever it has found.
    let need = Need::new(config, features, &item_table, place, is_writer).map(|mut need| {
        if n_sessions.is_some_and(|n| looks_like_raw_ids(features.n_items(), n)) {
            need.hint = RAW_IDS;
        }
        need
    });
    let wire = |bytes: u128| i64::try_from(bytes).unwrap_or(i64::MAX);
    let on_host = memory::of_host();
    let left = on_host.as_ref().map_or(u128::MAX, |available| available.bytes.into());
    let mine = [need.as_ref().map_or(0, |need| wire(need.host)), wire(left)];
    let all = collective.gather(&mine)?;
    let hosts = collective.gather_bytes(host_name().as_bytes())?;
    let need = need.map_err(TrainError::Model)?;

    let here: Vec<&[i64]> = all
        .chunks_exact(2)
        .zip(&hosts)
        .filter(|(_, host)| **host == hosts[collective.rank()])
        .map(|(of_rank, _)| of_rank)
        .collect();
    let needed: u128 = here.iter().map(|of_rank| of_rank[0] as u128).sum::<u128>().max(need.host);
    let left = here.iter().map(|of_rank| of_rank[1] as u64).min().unwrap_or(u64::MAX);
    let refuse = |who: String, needed, available| {
        let Need { most, hint, .. } = &need;
        Err(NotEnoughMemory { who, needed, available, most: most.clone(), hint }.into())
    };
    let alone = || "this rank needs at least".to_owned();
    match on_host {
        Some(Available { what, .. }) if needed > u128::from(left) => {
            let who = match (collective.world_size(), here.len()) {
                (1, _) => "the run needs at least".to_owned(),
                (_, 1) => alone(),
                (_, n) => format!("the {n} ranks on {} need at least", host_name()),
            };
            return refuse(who, needed, Available { bytes: left, what });
        }
        _ => {}
    }
    let alone = || if collective.world_size() == 1 { "the run needs at least".to_owned() } else { alone() };
    match memory::of_process() {
        Some(available) if need.host > u128::from(available.bytes) => {
            return refuse(alone(), need.host, available);
        }
        _ => {}
    }
    match memory::of_device(place.device) {
        Some(available) if need.device > u128::from(available.bytes) => {
            refuse(alone(), need.device, available)
        }
        _ => Ok(()),
    }
}

const RAW_IDS: &str = "the largest item id of `schema.pbtxt` looks like a raw id: `bireme preprocess` numbers \
                       products from 2 on, without gaps";

/// Whether a catalogue is far larger than sessions could be about.
fn looks_like_raw_ids(n_items: i64, n_sessions: usize) -> bool {
    n_items > 1 << 20 && n_items as u128 > 1000 * n_sessions as u128
}

impl Need {
    fn new(
        config: &Config,
        features: &Features,
        item_table: &ItemTable<'_>,
        place: RankContext<'_>,
        is_writer: bool,
    ) -> Result<Self, String> {
        let n_items = features.n_items() as u128;
        let mut need = match config.model.neural() {
            Some(neural) => Self::of_network(config, neural, features, item_table, place, is_writer)?,
            None => {
                // Occurrences and scores, i64 and f64.
                let of_item = 16
                    + match config.model {
                        ModelConfig::Recent {} => 8,
                        // An empty list for each.
                        ModelConfig::Vsknn(_) => 24,
                        _ => 0,
                    };
                Self {
                    host: n_items * of_item,
                    most: format!("most is for counts of {n_items} items (`schema.pbtxt`)"),
                    hint: "fewer items: the item id's domain in `schema.pbtxt` says how many there are",
                    device: 0,
                }
            }
        };
        // How often items occurred, in all and in a file.
        need.host += 16 * n_items;
        Ok(need)
    }

    fn of_network(
        config: &Config,
        neural: Neural<'_>,
        features: &Features,
        item_table: &ItemTable<'_>,
        place: RankContext<'_>,
        is_writer: bool,
    ) -> Result<Self, String> {
        let sizes = ParameterSizes::new(&neural, features, config.data.max_length, item_table)?;
        let is_adagrad = matches!(config.train.tables, TableOptimizer::Adagrad { .. });
        let (mut values, mut states) = (0, 0);
        let mut by_key: BTreeMap<String, OfKey> = BTreeMap::new();
        for (index, (name, size)) in sizes.named.iter().enumerate() {
            let n: u128 = size.iter().map(|&n| n as u128).product();
            let n_states = if is_adagrad && index < sizes.n_tables { 1 } else { 2 };
            values += n;
            states += n * n_states;
            let of_key = by_key.entry(key_of(name, size, config, neural, features)).or_default();
            of_key.n += n;
            of_key.n_copies = 2 + n_states;
            of_key.is_item_table = ItemTable::is_item_table(name);
        }
        let exact = if config.run.reduction == Reduction::Reproducible { 8 * values } else { 0 };
        let logits = config.run.precision.of_logits().elt_size_in_bytes() as u128 * item_table.len() as u128;
        let learnt = 4 * (2 * values + states) + exact + logits;
        let copied = if is_writer && item_table.ranks().is_none() { 4 * (values + states) } else { 0 };
        let (host, device) = match place.device {
            Device::Cpu => (learnt + copied, 0),
            // Values are drawn in the host's memory.
            _ => (copied.max(4 * values), learnt),
        };
        let largest = by_key.into_iter().max_by_key(|(_, of_key)| of_key.n);
        let Some((key, OfKey { n, n_copies, is_item_table })) = largest else { return Ok(Self::default()) };
        let is_divisible = is_item_table && !item_table.is_sharded() && place.collective.world_size() > 1;
        let most =
            format!("most is for {key}, {} times {n_copies} (values, gradient, optimizer)", in_words(4 * n));
        let hint = if is_divisible {
            "`parallel.item_table = \"sharded\"` divides the item table among the ranks"
        } else {
            "choose smaller numbers there"
        };
        Ok(Self { host, device, most, hint })
    }
}

/// Parameters whose sizes follow from the same keys.
#[derive(Default)]
struct OfKey {
    /// Their numbers.
    n: u128,
    /// How often these are kept: values, gradients, states of the optimizer.
    n_copies: u128,
    is_item_table: bool,
}

/// The keys that a parameter's size follows from.
fn key_of(name: &str, size: &[i64], config: &Config, neural: Neural<'_>, features: &Features) -> String {
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
            "{part}the item table of {n_items} items (`schema.pbtxt`) by `model.input.item_width` {item_width}"
        );
    }
    if let Some(table) = name.strip_prefix("tables.") {
        let (feature, rows) = (table.trim_end_matches(".weight"), size[0]);
        let feature_width = input.feature_width;
        return format!(
            "the table of {rows} values of `{feature}` (`schema.pbtxt`) by `model.input.feature_width` {feature_width}"
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
    fn a_catalogue_far_beyond_the_sessions_looks_like_raw_ids() {
        assert!(looks_like_raw_ids(1 << 40, 1000));
        assert!(!looks_like_raw_ids(10_000_000, 100_000));
        assert!(!looks_like_raw_ids(1000, 0));
    }
}
