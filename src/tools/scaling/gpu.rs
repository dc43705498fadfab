//! Estimates steps on GPUs from counted launches, operations and bytes, where no GPU was measured.
//!
//! A step is one CUDA graph. Its time is that of its launches, each a small kernel that waits for
//! the one before, of its products at the rate of f32, of its passes over the logits, the
//! optimizer's over the parameters and the copy of its numbers, at the rates of an H200; and of the
//! reduction of all gradients, by NVLink within a node and a network between nodes. Nothing
//! overlaps.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::TableLayout;
use super::predict::{Link, PredictedJob, StepModel};

/// Counts of a step on a GPU, by model and ranks.
const BUDGETS: &str = include_str!("../../../tests/fake_cuda/budgets.toml");

/// Sessions of the counted steps on one rank.
const COUNTED_SESSIONS: f64 = 256.0;

/// Seconds to launch a graph.
const GRAPH_LAUNCH: f64 = 25e-6;
/// Seconds of a small kernel behind another in a graph.
const SMALL_KERNEL: f64 = 1.85e-6;
/// Operations per second in f32.
const OPERATIONS_PER_S: f64 = 45e12;
/// Bytes per second of the device's memory.
const MEMORY_BYTES_PER_S: f64 = 4.3e12;
/// Bytes per second from the host.
const HOST_BYTES_PER_S: f64 = 50e9;
/// Seconds of a call of NCCL besides its bytes.
const NCCL_CALL: f64 = 10e-6;
/// Passes over the logits of the full softmax, f32.
const LOGITS_PASSES: f64 = 9.0;
/// Bytes per parameter and step of AdamW.
const OPTIMIZER_BYTES: f64 = 32.0;

const NVLINK: Link = Link { latency: 5e-6, bytes_per_s: 400e9 };
const NETWORK: Link = Link { latency: 10e-6, bytes_per_s: 50e9 };
const GPUS_PER_NODE: f64 = 8.0;

/// GPUs and items of the estimates.
const GPUS: [usize; 3] = [1, 8, 64];
const ITEMS: [f64; 2] = [1e5, 1e6];

/// What a step of a model queues on a GPU.
#[derive(Clone, Debug, Deserialize)]
struct Counted {
    launches: Launches,
    nccl_calls: Launches,
    /// Of library products.
    operations: Operations,
    /// Bytes that a step copies from the host.
    frame_bytes: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Launches {
    captured: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
struct Operations {
    fixed: f64,
    /// For each item of the catalogue, in products over all of it.
    per_item: f64,
}

/// Steps of a model on GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct GpuEstimate {
    #[serde(flatten)]
    pub job: PredictedJob,
    pub step_seconds: f64,
    /// Of all GPUs.
    pub sessions_per_s: f64,
}

/// Estimates for the model with this name in the budgets, `gru` for `configs/gru.toml`; empty for
/// others. `model`: its sizes.
pub fn estimates(name: &str, model: &StepModel) -> Vec<GpuEstimate> {
    let budgets: BTreeMap<String, BTreeMap<String, Counted>> =
        toml::from_str(BUDGETS).expect("the budgets are TOML");
    let counted = |ranks: &str| budgets.get(name)?.get(ranks).cloned();
    let (Some(alone), Some(together)) = (counted("1"), counted("2")) else { return Vec::new() };
    let on_gpus = StepModel {
        within: NVLINK,
        across: NETWORK,
        ranks_per_node: GPUS_PER_NODE,
        ..model.clone()
    };
    let estimate = |n_items: f64, ranks: usize| {
        let counted = if ranks == 1 { &alone } else { &together };
        let item_table = TableLayout::Replicated;
        let job = PredictedJob { ranks, item_table, n_items, sessions: model.sessions };
        let communication = match ranks {
            1 => 0.0,
            _ => counted.nccl_calls.captured * NCCL_CALL + on_gpus.communication(job),
        };
        let launches = counted.launches.captured;
        let step_seconds = alone.device_seconds(launches, &on_gpus, job) + communication;
        GpuEstimate {
            job,
            step_seconds,
            sessions_per_s: ranks as f64 * job.sessions / step_seconds,
        }
    };
    ITEMS.iter().flat_map(|&items| GPUS.map(|ranks| estimate(items, ranks))).collect()
}

impl Counted {
    /// One rank's time with `launches`, and with operations and bytes as counted here.
    fn device_seconds(&self, launches: f64, model: &StepModel, job: PredictedJob) -> f64 {
        let scale = job.sessions / COUNTED_SESSIONS;
        let over_items = self.operations.per_item * job.n_items;
        let operations = scale * (self.operations.fixed + over_items);
        // The full softmax has three products of 2 N V D operations each.
        let logits = scale * over_items / (6.0 * model.width);
        let changed = if self.operations.per_item > 0.0 { model.numbers(job) } else { 0.0 };
        let seconds = launches * SMALL_KERNEL
            + operations / OPERATIONS_PER_S
            + LOGITS_PASSES * 4.0 * logits / MEMORY_BYTES_PER_S
            + OPTIMIZER_BYTES * changed / MEMORY_BYTES_PER_S
            + scale * self.frame_bytes / HOST_BYTES_PER_S;
        seconds.max(GRAPH_LAUNCH)
    }
}

#[cfg(test)]
mod tests {
    use super::super::predict::PhaseSeconds;
    use super::*;

    #[test]
    fn estimates_follow_the_counts_of_the_budgets() {
        let model = StepModel {
            arithmetic: PhaseSeconds { fixed: 0.0, per_session: 0.0 },
            loss: PhaseSeconds { fixed: 0.0, per_session: 0.0 },
            optimizer: 0.0,
            sessions: 256.0,
            targets: 4.4,
            events: 5.4,
            width: 64.0,
            n_items: 1e5,
            numbers_per_item: 65.0,
            other_numbers: 1e5,
            within: Link::UNKNOWN,
            across: Link::UNKNOWN,
            ranks_per_node: 1.0,
        };
        assert_eq!(estimates("unknown", &model), []);
        let of_gru = estimates("gru", &model);
        assert_eq!(of_gru.len(), GPUS.len() * ITEMS.len());
        let [one, eight, many, ..] = of_gru[..] else { panic!("three numbers of GPUs") };
        assert!((5e-4..5e-3).contains(&one.step_seconds), "{one:?}");
        assert!(one.step_seconds < eight.step_seconds && eight.step_seconds < many.step_seconds);
        let of_xlnet = estimates("xlnet", &model);
        assert!(of_xlnet[0].step_seconds < one.step_seconds, "fewer targets");
    }
}
