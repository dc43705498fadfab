//! What steps on more ranks and over other catalogues would take.
//!
//! A model of a step, calibrated by measured steps of one rank and by measured sums over ranks. Its assumptions:
//!
//! - Phases of arithmetic grow in a straight line with the sessions of a rank, through two measured points.
//! - The loss also grows with the catalogue, and does not depend on who holds it: with the table shared out, a rank scores the
//!   targets of all ranks against its share of the rows.
//! - The optimizer takes as long as there are parameters on a rank; all but the item table stay as large as they are.
//! - A sum over ranks goes round a ring or up and down a tree, whichever is shorter; over several nodes, first within each, then
//!   across, every rank with its own part, and back (Thakur et al. 2005).
//! - No rank is late, and nothing of it goes on beside arithmetic, as the sum of a replicated table's gradients may.

use serde::Serialize;

use crate::config::TableLayout;
use crate::doctor::{AllReduce, Findings};

/// What a rank can say to the next.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Link {
    /// Seconds until it is heard.
    pub latency: f64,
    /// Bytes a second of each rank.
    pub bytes_per_s: f64,
}

impl Link {
    /// Of ranks on one machine where nothing could be measured.
    pub const UNKNOWN: Self = Self { latency: 0.0, bytes_per_s: f64::INFINITY };

    /// Such that the smallest and the largest sum that were measured take as long as they did.
    pub fn fit(found: &Findings) -> Self {
        let (Some(least), Some(most)) = (found.all_reduces.first(), found.all_reduces.last()) else {
            return Self::UNKNOWN;
        };
        let ranks = found.ranks as f64;
        let latency = least.seconds / (2.0 * rounds(ranks));
        let AllReduce { bytes, seconds } = *most;
        let around = ring_bytes(bytes, ranks);
        // A sum that is not longer than its latencies says nothing about the rate.
        let seconds = (seconds - 2.0 * (ranks - 1.0) * latency).max(seconds / 10.0);
        Self { latency, bytes_per_s: around / seconds }
    }

    /// Seconds that the sum of a tensor takes.
    fn all_reduce(self, bytes: f64, ranks: f64) -> f64 {
        let ring = 2.0 * (ranks - 1.0) * self.latency + ring_bytes(bytes, ranks) / self.bytes_per_s;
        let tree = 2.0 * rounds(ranks) * (self.latency + bytes / self.bytes_per_s);
        ring.min(tree)
    }

    /// Seconds until every rank has the parts of all, `bytes` together; or each its part of a sum of so many.
    fn gather(self, bytes: f64, ranks: f64) -> f64 {
        let by_ring = (ranks - 1.0).min(rounds(ranks)) * self.latency;
        by_ring + ring_bytes(bytes, ranks) / 2.0 / self.bytes_per_s
    }
}

/// Bytes that a ring moves through each rank's link to sum a tensor.
fn ring_bytes(bytes: f64, ranks: f64) -> f64 {
    2.0 * (ranks - 1.0) / ranks * bytes
}

/// Rounds of a tree.
fn rounds(ranks: f64) -> f64 {
    ranks.log2().ceil()
}

/// A phase's seconds by the sessions of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Line {
    /// However few sessions there are.
    pub fixed: f64,
    /// For each session.
    pub per_session: f64,
}

impl Line {
    /// Through two measured points `(sessions, seconds)`, and never below zero.
    pub fn through((few, of_few): (f64, f64), (many, of_many): (f64, f64)) -> Self {
        let slope = if many > few { (of_many - of_few) / (many - few) } else { f64::INFINITY };
        let per_session = slope.clamp(0.0, of_many / many);
        Self { fixed: of_many - per_session * many, per_session }
    }

    fn at(self, sessions: f64) -> f64 {
        self.fixed + self.per_session * sessions
    }
}

/// The model of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// Data, forward, backward, records.
    pub arithmetic: Line,
    /// Scoring the catalogue.
    pub loss: Line,
    /// Of all parameters of the measured catalogue.
    pub optimizer: f64,
    /// Sessions of a step of one rank, as measured.
    pub sessions: f64,
    /// Of a session, on average.
    pub targets: f64,
    /// Of a session, on average.
    pub events: f64,
    /// Width of an item's vector.
    pub width: f64,
    /// Rows of the measured item table.
    pub n_items: f64,
    /// Parameters of tables of items, for each item.
    pub numbers_per_item: f64,
    /// All other parameters.
    pub other_numbers: f64,
    /// Between ranks of a node.
    pub within: Link,
    /// Between nodes.
    pub across: Link,
    /// Ranks of a node.
    pub ranks_per_node: f64,
}

/// A job: what a prediction is for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Job {
    /// Ranks.
    pub ranks: usize,
    /// Who holds the item table.
    pub item_table: TableLayout,
    /// Rows of the item table.
    pub n_items: f64,
    /// Sessions of each rank in a step.
    pub sessions: f64,
}

/// What the model says of a job.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// The job.
    #[serde(flatten)]
    pub job: Job,
    /// Of a step.
    pub step_seconds: f64,
    /// How much of that is communication, 0 to 1.
    pub communication: f64,
    /// Of all ranks.
    pub sessions_per_s: f64,
    /// Beside as many single ranks over the same catalogue, 0 to 1.
    pub efficiency: f64,
    /// Parameters, gradients and moments of a rank.
    pub bytes_per_rank: f64,
}

impl Model {
    /// What a job would do.
    pub fn predict(&self, job: Job) -> Prediction {
        let alone = Job { ranks: 1, ..job };
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
    fn numbers(&self, Job { ranks, item_table, n_items, .. }: Job) -> f64 {
        let of_items = self.numbers_per_item * n_items;
        self.other_numbers
            + match item_table {
                TableLayout::Replicated => of_items,
                TableLayout::Sharded => of_items / ranks as f64,
            }
    }

    fn arithmetic_seconds(&self, job: Job) -> f64 {
        let measured = self.numbers_per_item * self.n_items + self.other_numbers;
        self.arithmetic.at(job.sessions)
            + self.loss.at(job.sessions) * job.n_items / self.n_items
            + self.optimizer * self.numbers(job) / measured
    }

    fn communication(&self, job: Job) -> f64 {
        if job.ranks == 1 {
            return 0.0;
        }
        let ranks = job.ranks as f64;
        let sessions = ranks * job.sessions;
        // Parameters of a rank are reduced if all have them, and 4 numbers of each step always.
        let reduced = match job.item_table {
            TableLayout::Replicated => self.numbers(job),
            TableLayout::Sharded => self.other_numbers,
        };
        let reduced = self.all_reduce(4.0 * reduced + 16.0, ranks);
        if job.item_table == TableLayout::Replicated {
            return reduced;
        }
        let (targets, events) = (self.targets * sessions, self.events * sessions);
        // Counts of targets and of events, and squares.
        let counts = 3.0 * self.gather(8.0 * ranks, ranks);
        // Rows of events are asked for, come, and their gradients go back.
        let of_events =
            self.gather(8.0 * events, ranks) + 2.0 * self.gather(4.0 * self.width * events, ranks);
        // States and targets go out, gradients of states and scores of targets come back.
        let of_targets = 2.0 * self.gather(4.0 * self.width * targets, ranks)
            + self.gather(8.0 * targets, ranks)
            + self.gather(4.0 * targets, ranks);
        // The largest and the sum of each softmax.
        reduced + counts + of_events + of_targets + 2.0 * self.all_reduce(4.0 * targets, ranks)
    }

    /// Ranks of a node, and nodes.
    fn nodes(&self, ranks: f64) -> (f64, f64) {
        (ranks.min(self.ranks_per_node), (ranks / self.ranks_per_node).ceil())
    }

    fn all_reduce(&self, bytes: f64, ranks: f64) -> f64 {
        match self.nodes(ranks) {
            (_, 1.0) => self.within.all_reduce(bytes, ranks),
            (local, nodes) => {
                2.0 * self.within.gather(bytes, local) + self.across.all_reduce(bytes / local, nodes)
            }
        }
    }

    fn gather(&self, bytes: f64, ranks: f64) -> f64 {
        match self.nodes(ranks) {
            (_, 1.0) => self.within.gather(bytes, ranks),
            (local, nodes) => self.across.gather(bytes / local, nodes) + self.within.gather(bytes, local),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        Model {
            arithmetic: Line { fixed: 0.01, per_session: 1e-4 },
            loss: Line { fixed: 0.0, per_session: 1e-4 },
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

    fn job(ranks: usize, item_table: TableLayout, n_items: f64) -> Job {
        Job { ranks, item_table, n_items, sessions: 256.0 }
    }

    #[test]
    fn a_fitted_link_gives_back_what_was_measured() {
        let link = Link { latency: 3e-5, bytes_per_s: 2e9 };
        let of = |bytes| AllReduce { bytes, seconds: link.all_reduce(bytes, 4.0) };
        let found =
            Findings { ranks: 4, all_reduces: vec![of(0.0), of(4e6), of(6.4e7)], ..Findings::default() };
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
        let line = Line::through((64.0, 0.02), (256.0, 0.05));
        assert!((line.at(64.0) - 0.02).abs() < 1e-12 && (line.at(256.0) - 0.05).abs() < 1e-12);
        // What is measured as faster in whole than in part has no fixed costs.
        assert_eq!(Line::through((64.0, 0.001), (256.0, 0.05)).fixed, 0.0);
        assert_eq!(Line::through((64.0, 0.06), (256.0, 0.05)).per_session, 0.0);
        assert!((Line::through((256.0, 0.05), (256.0, 0.05)).at(128.0) - 0.025).abs() < 1e-12);
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
