//! Predicts the step time on more ranks and over larger catalogues.
//!
//! The model of a step is calibrated by measured steps of one rank and by measured all-reduces. It
//! assumes:
//!
//! - Arithmetic is linear in the sessions per rank, through two measured points.
//! - The loss is also linear in the catalogue, for both layouts of the item table: with a sharded
//!   table, a rank scores the targets of all ranks against its shard.
//! - The optimizer is linear in the parameters per rank; only the item table grows.
//! - An all-reduce takes the faster of a ring and a tree; over several nodes it reduces within each
//!   node, then across nodes, every rank with its own part, and gathers within each node (Thakur et
//!   al. 2005).
//! - No rank is late and no communication overlaps with arithmetic, although the sum of the
//!   gradients of a replicated table may overlap in a run.

use serde::Serialize;

use super::TableLayout;
use super::measured::StepMeasurement;
use crate::findings::{AllReduce, Findings};

/// Connection between two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// In seconds.
    pub latency: f64,
    /// Per rank.
    pub bytes_per_s: f64,
}

impl Link {
    /// A link without cost, for a link that was not measured.
    pub const UNKNOWN: Self = Self { latency: 0.0, bytes_per_s: f64::INFINITY };

    /// The link that explains the smallest and the largest measured all-reduce.
    pub fn fit(found: &Findings) -> Self {
        let (Some(least), Some(most)) = (found.all_reduces.first(), found.all_reduces.last())
        else {
            return Self::UNKNOWN;
        };
        let ranks = found.ranks as f64;
        let latency = least.seconds / (2.0 * rounds(ranks));
        let AllReduce { bytes, seconds } = *most;
        let around = ring_bytes(bytes, ranks);
        // The rate cannot be derived from a time that its latencies explain: bound it.
        let seconds = (seconds - 2.0 * (ranks - 1.0) * latency).max(seconds / 10.0);
        Self { latency, bytes_per_s: around / seconds }
    }

    /// Seconds of an all-reduce of `bytes`.
    fn all_reduce(self, bytes: f64, ranks: f64) -> f64 {
        let ring = 2.0 * (ranks - 1.0) * self.latency + ring_bytes(bytes, ranks) / self.bytes_per_s;
        let tree = 2.0 * rounds(ranks) * (self.latency + bytes / self.bytes_per_s);
        ring.min(tree)
    }

    /// Seconds of an all-gather to, or a reduce-scatter of, `bytes`.
    fn gather(self, bytes: f64, ranks: f64) -> f64 {
        let by_ring = (ranks - 1.0).min(rounds(ranks)) * self.latency;
        by_ring + ring_bytes(bytes, ranks) / 2.0 / self.bytes_per_s
    }
}

/// Bytes that a ring all-reduce moves through the link of each rank.
fn ring_bytes(bytes: f64, ranks: f64) -> f64 {
    2.0 * (ranks - 1.0) / ranks * bytes
}

/// Rounds of a tree.
fn rounds(ranks: f64) -> f64 {
    ranks.log2().ceil()
}

/// A measured time of a phase.
#[derive(Clone, Copy, Debug)]
struct PhasePoint {
    sessions: f64,
    seconds: f64,
}

/// Seconds of a phase, linear in the sessions per rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PhaseSeconds {
    /// For no session.
    pub fixed: f64,
    pub per_session: f64,
}

impl PhaseSeconds {
    /// The line through two points, with neither term negative.
    fn through(few: PhasePoint, many: PhasePoint) -> Self {
        let slope = if many.sessions > few.sessions {
            (many.seconds - few.seconds) / (many.sessions - few.sessions)
        } else {
            f64::INFINITY
        };
        let per_session = slope.clamp(0.0, many.seconds / many.sessions);
        Self { fixed: many.seconds - per_session * many.sessions, per_session }
    }

    fn at(self, sessions: f64) -> f64 {
        self.fixed + self.per_session * sessions
    }
}

/// Calibrated model of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepModel {
    /// Phases `data`, `forward`, `backward` and `records`.
    pub arithmetic: PhaseSeconds,
    /// Phase `loss`, over the measured catalogue.
    pub loss: PhaseSeconds,
    /// Phase `optimizer`, in seconds, for all parameters of the measured catalogue.
    pub optimizer: f64,
    /// Sessions per step of the measured rank.
    pub sessions: f64,
    /// Mean per session.
    pub targets: f64,
    /// Mean per session.
    pub events: f64,
    /// Width of an item vector.
    pub width: f64,
    /// Rows of the measured item table.
    pub n_items: f64,
    /// Parameters of item tables, per item.
    pub numbers_per_item: f64,
    /// All other parameters.
    pub other_numbers: f64,
    /// Between ranks of a node.
    pub within: Link,
    /// Between nodes.
    pub across: Link,
    pub ranks_per_node: f64,
}

/// Numbers of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ParameterCounts {
    /// In tables with a row per item.
    pub of_items: f64,
    pub others: f64,
}

/// What a [`StepModel`] is calibrated by.
pub struct Calibration<'a> {
    /// One rank with fewer sessions per step; `whole` again where it cannot have fewer.
    pub part: &'a StepMeasurement,
    /// One rank with all sessions of a step.
    pub whole: &'a StepMeasurement,
    pub parameters: ParameterCounts,
    /// Rows of the item table.
    pub n_items: f64,
    /// Width of an item vector.
    pub width: f64,
    /// Mean number of events.
    pub events_per_session: f64,
    pub within: Link,
    pub across: Link,
    pub ranks_per_node: usize,
}

/// The job that a prediction is for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PredictedJob {
    pub ranks: usize,
    pub item_table: TableLayout,
    /// Rows of the item table.
    pub n_items: f64,
    /// Sessions per step and rank.
    pub sessions: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    #[serde(flatten)]
    pub job: PredictedJob,
    pub step_seconds: f64,
    /// Share of the step, 0 to 1.
    pub communication: f64,
    /// Of all ranks.
    pub sessions_per_s: f64,
    /// Throughput relative to as many independent single ranks, 0 to 1.
    pub efficiency: f64,
    /// Memory of parameters, gradients and moments.
    pub bytes_per_rank: f64,
}

impl StepModel {
    pub fn calibrate(calibration: &Calibration<'_>) -> Self {
        let &Calibration { part, whole, parameters, n_items, .. } = calibration;
        let phase = |names: &[&str]| {
            let point = |of: &StepMeasurement| PhasePoint {
                sessions: of.global_batch as f64,
                seconds: of.phase_seconds(names),
            };
            PhaseSeconds::through(point(part), point(whole))
        };
        let sessions = whole.global_batch as f64;
        Self {
            arithmetic: phase(&["data", "forward", "backward", "records"]),
            loss: phase(&["loss"]),
            optimizer: whole.phase_seconds(&["optimizer"]),
            sessions,
            targets: whole.n_targets / sessions,
            events: calibration.events_per_session,
            width: calibration.width,
            n_items,
            numbers_per_item: parameters.of_items / n_items,
            other_numbers: parameters.others,
            within: calibration.within,
            across: calibration.across,
            ranks_per_node: calibration.ranks_per_node as f64,
        }
    }

    pub fn predict(&self, job: PredictedJob) -> Prediction {
        let alone = PredictedJob { ranks: 1, ..job };
        let (communication, arithmetic) = (self.communication(job), self.arithmetic_seconds(job));
        let step_seconds = communication + arithmetic;
        Prediction {
            job,
            step_seconds,
            communication: communication / step_seconds,
            sessions_per_s: job.ranks as f64 * job.sessions / step_seconds,
            efficiency: self.arithmetic_seconds(alone) / step_seconds,
            // Values, gradients and two moments, f32.
            bytes_per_rank: 16.0 * self.numbers(job),
        }
    }

    /// Parameters of a rank.
    pub(super) fn numbers(
        &self,
        PredictedJob { ranks, item_table, n_items, .. }: PredictedJob,
    ) -> f64 {
        let of_items = self.numbers_per_item * n_items;
        self.other_numbers
            + match item_table {
                TableLayout::Replicated => of_items,
                TableLayout::Sharded => of_items / ranks as f64,
            }
    }

    fn arithmetic_seconds(&self, job: PredictedJob) -> f64 {
        let measured = self.numbers_per_item * self.n_items + self.other_numbers;
        self.arithmetic.at(job.sessions)
            + self.loss.at(job.sessions) * job.n_items / self.n_items
            + self.optimizer * self.numbers(job) / measured
    }

    pub(super) fn communication(&self, job: PredictedJob) -> f64 {
        if job.ranks == 1 {
            return 0.0;
        }
        let ranks = job.ranks as f64;
        let sessions = ranks * job.sessions;
        // Gradients of replicated parameters, and four scalars of the step.
        let reduced = match job.item_table {
            TableLayout::Replicated => self.numbers(job),
            TableLayout::Sharded => self.other_numbers,
        };
        let reduced = self.all_reduce(4.0 * reduced + 16.0, ranks);
        if job.item_table == TableLayout::Replicated {
            return reduced;
        }
        let (targets, events) = (self.targets * sessions, self.events * sessions);
        // Numbers of targets and events per rank, and squared gradient norms.
        let counts = 3.0 * self.gather(8.0 * ranks, ranks);
        // Row indices of events go out, rows come back, and their gradients go out.
        let of_events =
            self.gather(8.0 * events, ranks) + 2.0 * self.gather(4.0 * self.width * events, ranks);
        // States and targets go out; gradients of states and scores of targets come back.
        let of_targets = 2.0 * self.gather(4.0 * self.width * targets, ranks)
            + self.gather(8.0 * targets, ranks)
            + self.gather(4.0 * targets, ranks);
        // Maximum and sum of each softmax.
        reduced + counts + of_events + of_targets + 2.0 * self.all_reduce(4.0 * targets, ranks)
    }

    /// Ranks per node, and nodes.
    fn nodes(&self, ranks: f64) -> (f64, f64) {
        (ranks.min(self.ranks_per_node), (ranks / self.ranks_per_node).ceil())
    }

    fn all_reduce(&self, bytes: f64, ranks: f64) -> f64 {
        match self.nodes(ranks) {
            (_, 1.0) => self.within.all_reduce(bytes, ranks),
            (local, nodes) => {
                2.0 * self.within.gather(bytes, local)
                    + self.across.all_reduce(bytes / local, nodes)
            }
        }
    }

    fn gather(&self, bytes: f64, ranks: f64) -> f64 {
        match self.nodes(ranks) {
            (_, 1.0) => self.within.gather(bytes, ranks),
            (local, nodes) => {
                self.across.gather(bytes / local, nodes) + self.within.gather(bytes, local)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> StepModel {
        StepModel {
            arithmetic: PhaseSeconds { fixed: 0.01, per_session: 1e-4 },
            loss: PhaseSeconds { fixed: 0.0, per_session: 1e-4 },
            optimizer: 0.01,
            sessions: 256.0,
            targets: 5.0,
            events: 6.0,
            width: 64.0,
            n_items: 1e5,
            numbers_per_item: 65.0,
            other_numbers: 1e5,
            within: Link { latency: 1e-5, bytes_per_s: 1e10 },
            across: Link { latency: 2e-5, bytes_per_s: 2e9 },
            ranks_per_node: 8.0,
        }
    }

    fn job(ranks: usize, item_table: TableLayout, n_items: f64) -> PredictedJob {
        PredictedJob { ranks, item_table, n_items, sessions: 256.0 }
    }

    #[test]
    fn a_fitted_link_gives_back_what_was_measured() {
        let link = Link { latency: 3e-5, bytes_per_s: 2e9 };
        let of = |bytes| AllReduce { bytes, seconds: link.all_reduce(bytes, 4.0) };
        let found = Findings {
            ranks: 4,
            all_reduces: vec![of(0.0), of(4e6), of(6.4e7)],
            ..Findings::default()
        };
        let fitted = Link::fit(&found);
        assert!((fitted.latency / link.latency - 1.0).abs() < 1e-9, "{fitted:?}");
        assert!((fitted.bytes_per_s / link.bytes_per_s - 1.0).abs() < 1e-9, "{fitted:?}");
    }

    #[test]
    fn small_sums_go_up_a_tree_and_large_ones_round_a_ring() {
        let link = Link { latency: 1e-5, bytes_per_s: 1e9 };
        assert!((link.all_reduce(8.0, 64.0) - 12.0 * (1e-5 + 8e-9)).abs() < 1e-12);
        assert!((link.all_reduce(1e9, 64.0) - (126e-5 + 2.0 * 63.0 / 64.0)).abs() < 1e-9);
    }

    #[test]
    fn lines_go_through_their_points_and_stay_above_zero() {
        let through = |few: (f64, f64), many: (f64, f64)| {
            let [few, many] =
                [few, many].map(|(sessions, seconds)| PhasePoint { sessions, seconds });
            PhaseSeconds::through(few, many)
        };
        let line = through((64.0, 0.02), (256.0, 0.05));
        assert!((line.at(64.0) - 0.02).abs() < 1e-12 && (line.at(256.0) - 0.05).abs() < 1e-12);
        // A time that grows faster than the sessions has no fixed part.
        assert_eq!(through((64.0, 0.001), (256.0, 0.05)).fixed, 0.0);
        assert_eq!(through((64.0, 0.06), (256.0, 0.05)).per_session, 0.0);
        assert!((through((256.0, 0.05), (256.0, 0.05)).at(128.0) - 0.025).abs() < 1e-12);
    }

    #[test]
    fn one_rank_takes_what_was_measured() {
        let Prediction { step_seconds, efficiency, communication, bytes_per_rank, .. } =
            model().predict(job(1, TableLayout::Replicated, 1e5));
        assert!((step_seconds - (0.01 + 0.0256 + 0.0256 + 0.01)).abs() < 1e-12);
        assert_eq!((efficiency, communication), (1.0, 0.0));
        assert_eq!(bytes_per_rank, 16.0 * (65e5 + 1e5));
    }

    #[test]
    fn a_replicated_table_travels_and_a_sharded_one_does_not() {
        let model = model();
        let of = |item_table, n_items| model.predict(job(64, item_table, n_items));
        let (small, large) = (of(TableLayout::Sharded, 1e5), of(TableLayout::Sharded, 1e8));
        let seconds = |of: Prediction| of.communication * of.step_seconds;
        assert!((seconds(small) - seconds(large)).abs() < 1e-9);
        let (small, large) = (of(TableLayout::Replicated, 1e5), of(TableLayout::Replicated, 1e8));
        assert!(seconds(large) > 500.0 * seconds(small));
        assert!(of(TableLayout::Sharded, 1e8).bytes_per_rank < large.bytes_per_rank / 60.0);
    }
}
