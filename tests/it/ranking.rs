//! Ranks by counting are ranks by sorting, and figures do not depend on who evaluated.

use bireme::collective::threads;
use bireme::data::{Batch, Config, Days, Segment, Split};
use bireme::metrics::{self, Metrics, evaluate, rank_targets};
use bireme::model::{GruConfig, Network, Neural, Recommender};
use tch::{Device, Tensor};

use crate::fixtures;

/// A table with few distinct values, so that ties are many.
fn scores() -> Tensor {
    let mut number = fixtures::numbers(5);
    let values: Vec<f32> = (0..50 * 40).map(|_| number(12) as f32).collect();
    Tensor::from_slice(&values).view([50, 40])
}

fn network(n_items: i64) -> Network {
    let features = fixtures::features(&[(fixtures::ITEM.to_owned(), Some(n_items))]);
    Network::new(&Neural::Gru(&GruConfig::default()), &features, 20, (3, Device::Cpu)).unwrap()
}

#[test]
fn counting_gives_the_ranks_of_sorting() {
    let scores = scores();
    let mut number = fixtures::numbers(6);
    let targets: Vec<i64> = (0..50).map(|_| number(40) as i64).collect();
    for chunk in [1, 7, 39, 40, 1000] {
        let slice = |items: std::ops::Range<i64>| scores.narrow(1, items.start, items.end - items.start);
        let (ranks, losses) = rank_targets(slice, &Tensor::from_slice(&targets), 40, chunk);
        let ranks: Vec<i64> = ranks.try_into().unwrap();
        for (row, &target) in targets.iter().enumerate() {
            let of_row: Vec<f32> = scores.get(row as i64).try_into().unwrap();
            let mut order: Vec<i64> = (2..40).collect();
            // A stable sort: among equals the lower index stays first.
            order.sort_by(|&a, &b| of_row[b as usize].total_cmp(&of_row[a as usize]));
            let expected = order.iter().position(|&item| item == target).map_or(41, |place| place as i64 + 1);
            assert_eq!(ranks[row], expected, "row {row}, chunk {chunk}");
            let sum: f64 = of_row.iter().map(|&score| f64::from(score).exp()).sum();
            let loss = sum.ln() - f64::from(of_row[target as usize]);
            assert!((losses.double_value(&[row as i64]) - loss).abs() < 1e-5);
        }
    }
}

/// The same figures from all scores at once, sorted, in plain f64.
fn offline(network: &Network, sessions: &[Vec<i64>]) -> Metrics {
    let mut ranks = Vec::new();
    for block in sessions.chunks(32) {
        let batch = Batch {
            columns: vec![Tensor::from_slice(&block.concat())],
            lengths: block.iter().map(Vec::len).collect(),
            session_seeds: vec![0; block.len()],
            step_seed: 0,
            segments: vec![Segment { seed: 0, n_sessions: block.len() }],
        };
        let (known, _) = batch.split_last();
        let scores = network.scores(&network.encode(&known), 0..network.n_items());
        for (row, session) in block.iter().enumerate() {
            let of_row: Vec<f32> = scores.get(row as i64).try_into().unwrap();
            let mut order: Vec<i64> = (2..network.n_items()).collect();
            order.sort_by(|&a, &b| of_row[b as usize].total_cmp(&of_row[a as usize]));
            ranks.push(order.iter().position(|item| item == session.last().unwrap()).unwrap() + 1);
        }
    }
    // Exact: how many sessions had each rank, then one product a rank.
    let mean = |k: usize, value: fn(f64) -> f64| {
        let at = |rank: usize| ranks.iter().filter(|&&other| other == rank).count() as f64;
        (1..=k).map(|rank| at(rank) * value(rank as f64)).sum::<f64>() / ranks.len() as f64
    };
    Metrics {
        n_sessions: ranks.len() as i64,
        loss: f64::NAN,
        ndcg_at_10: mean(10, |rank| 1.0 / (rank + 1.0).log2()),
        ndcg_at_20: mean(20, |rank| 1.0 / (rank + 1.0).log2()),
        recall_at_10: mean(10, |_| 1.0),
        recall_at_20: mean(20, |_| 1.0),
        mrr_at_20: mean(20, |rank| 1.0 / rank),
    }
}

#[test]
fn figures_are_the_same_to_the_last_digit_on_any_number_of_ranks_and_offline() {
    let dir = tempfile::tempdir().unwrap();
    let n_items = 60;
    fixtures::write_schema(dir.path(), n_items);
    let sessions = fixtures::sessions(333, n_items, 9);
    fixtures::write_sessions(&dir.path().join("1/valid.parquet"), &sessions, |_| 0.0);
    let config = Config { first_day: 1, last_day: 2, max_length: 20, features: Vec::new() };
    let network = || network(n_items);
    let on_ranks = |world_size: usize, scores_mib| {
        threads::spawn(world_size, |collective| {
            let days = Days::open(dir.path(), &config).unwrap();
            let file = days.file(1, Split::Valid).unwrap();
            let config = metrics::Config { block: 32, scores_mib };
            evaluate(&network(), &file, days.features(), &config, collective).unwrap()
        })
    };
    let alone = on_ranks(1, 256).remove(0);
    let expected = offline(&network(), &sessions);
    assert_eq!(Metrics { loss: 0.0, ..alone.clone() }, Metrics { loss: 0.0, ..expected });
    assert!(alone.loss > 3.0 && alone.loss < 5.0, "{}", alone.loss);
    for world_size in [2, 3, 4] {
        for metrics in on_ranks(world_size, 256) {
            assert_eq!(metrics, alone);
        }
    }
    // More ranks than blocks: some have nothing to evaluate.
    for metrics in on_ranks(13, 1) {
        assert_eq!(metrics, alone);
    }
}

#[test]
fn a_file_without_sessions_has_no_figures() {
    let dir = tempfile::tempdir().unwrap();
    fixtures::write_schema(dir.path(), 10);
    fixtures::write_sessions(&dir.path().join("1/valid.parquet"), &[], |_| 0.0);
    let config = Config { first_day: 1, last_day: 2, max_length: 20, features: Vec::new() };
    for metrics in threads::spawn(2, |collective| {
        let days = Days::open(dir.path(), &config).unwrap();
        let file = days.file(1, Split::Valid).unwrap();
        let network = network(10);
        evaluate(&network, &file, days.features(), &metrics::Config::default(), collective).unwrap()
    }) {
        assert_eq!(metrics.n_sessions, 0);
        assert!(metrics.ndcg_at_10.is_nan() && metrics.loss.is_nan());
        assert!(serde_json::to_string(&metrics).unwrap().contains("\"ndcg_at_10\":null"));
    }
}
