//! Ranking by counting equals ranking by sorting, on any number of ranks.

use bireme::collective::threads;
use bireme::config::{Cases, EvaluateConfig, UnknownTargets};
use bireme::data::{Batch, DataConfig, Days, Segment, Split, occurrences};
use bireme::metrics::{Evaluation, Metrics, Ranking, deciles, evaluate, rank_targets};
use bireme::model::{GruConfig, ItemTable, Network, Neural, Recommender};
use bireme_tools::report::evaluation_file::SessionOutcome;
use tch::{Device, Tensor};

use crate::support::session_data;
use crate::support::tensors::nothing_hidden;

/// A table with few distinct values, so that ties are many.
fn scores() -> Tensor {
    let mut number = session_data::numbers(5);
    let values: Vec<f32> = (0..50 * 40).map(|_| number(12) as f32).collect();
    Tensor::from_slice(&values).view([50, 40])
}

fn network(n_items: i64) -> Network<'static> {
    let features = session_data::features(&[(session_data::ITEM.to_owned(), Some(n_items))]);
    Network::new(&Neural::Gru(&GruConfig::default()), &features, 20, 3, Device::Cpu).unwrap()
}

#[test]
fn counting_gives_the_ranks_of_sorting() {
    let scores = scores();
    let mut number = session_data::numbers(6);
    let targets: Vec<i64> = (0..50).map(|_| number(40) as i64).collect();
    for chunk in [1, 7, 39, 40, 1000] {
        let slice =
            |items: std::ops::Range<i64>| scores.narrow(1, items.start, items.end - items.start);
        let ranking = rank_targets(
            slice,
            (&Tensor::from_slice(&targets), &nothing_hidden(50)),
            &ItemTable::replicated(40),
            chunk,
            5,
        )
        .unwrap();
        let Ranking { ranks, losses, in_top } = ranking;
        let ranks: Vec<i64> = ranks.try_into().unwrap();
        let mut expected_in_top = [false; 40];
        for (row, &target) in targets.iter().enumerate() {
            let of_row: Vec<f32> = scores.get(row as i64).try_into().unwrap();
            let mut order: Vec<i64> = (2..40).collect();
            // A stable sort: among equals the lower index stays first.
            order.sort_by(|&a, &b| of_row[b as usize].total_cmp(&of_row[a as usize]));
            let expected =
                order.iter().position(|&item| item == target).map_or(41, |place| place as i64 + 1);
            assert_eq!(ranks[row], expected, "row {row}, chunk {chunk}");
            order[..5].iter().for_each(|&item| expected_in_top[item as usize] = true);
            let sum: f64 = of_row.iter().map(|&score| f64::from(score).exp()).sum();
            let loss = sum.ln() - f64::from(of_row[target as usize]);
            assert!((losses.double_value(&[row as i64]) - loss).abs() < 1e-5);
        }
        assert_eq!(Vec::<bool>::try_from(in_top).unwrap(), expected_in_top, "chunk {chunk}");
    }
}

#[test]
fn items_hidden_from_a_session_are_not_ranked() {
    let scores = Tensor::from_slice(&[9f32, 9.0, 5.0, 4.0, 3.0, 2.0]).repeat([4, 1]);
    let targets = Tensor::from_slice(&[3i64, 5, 2, 4]);
    let hidden = Tensor::from_slice(&[2i64, -1, 2, 3, 2, -1, 5, 1]).view([4, 2]);
    for chunk in [1, 2, 4, 6] {
        let slice = |items: std::ops::Range<i64>| {
            scores.narrow(1, items.start, items.end - items.start).copy()
        };
        let ranking =
            rank_targets(slice, (&targets, &hidden), &ItemTable::replicated(6), chunk, 3).unwrap();
        let ranks: Vec<i64> = ranking.ranks.try_into().unwrap();
        assert_eq!(ranks, [1, 2, 7, 3], "chunk {chunk}");
        let in_top: Vec<bool> = ranking.in_top.try_into().unwrap();
        assert_eq!(in_top, [false, false, true, true, true, true], "chunk {chunk}");
        let plain = rank_targets(
            slice,
            (&targets, &nothing_hidden(4)),
            &ItemTable::replicated(6),
            chunk,
            3,
        )
        .unwrap();
        assert_eq!(ranking.losses, plain.losses);
    }
}

#[test]
fn sharded_ranking_finds_what_one_rank_finds() {
    // Items that a session may not be recommended, on one rank or another.
    let hidden = |row: i64| [row % 7 + 2, if row % 3 == 0 { 39 - row % 20 } else { -1 }];
    let ranking = |share: &ItemTable<'_>, hides: bool, chunk: i64, k: i64| {
        let scores = scores();
        let targets = Tensor::from_slice(&(0..50).map(|row| row % 40).collect::<Vec<i64>>());
        let hidden = match hides {
            true => {
                Tensor::from_slice(&(0..50).flat_map(hidden).collect::<Vec<i64>>()).view([50, 2])
            }
            false => nothing_hidden(50),
        };
        let slice = |items: std::ops::Range<i64>| {
            scores.narrow(1, items.start, items.end - items.start).copy()
        };
        rank_targets(slice, (&targets, &hidden), share, chunk, k).unwrap()
    };
    for (world_size, chunk) in [(1, 7), (2, 5), (3, 1), (3, 1000)] {
        for hides in [true, false] {
            // More than a share has items, too.
            for k in [5, 20, 38] {
                let of_ranks = threads::spawn(world_size, |collective| {
                    ranking(&ItemTable::sharded(40, collective), hides, chunk, k)
                });
                let alone = ranking(&ItemTable::replicated(40), hides, 40, k);
                let in_top: Vec<&Tensor> = of_ranks.iter().map(|ranking| &ranking.in_top).collect();
                assert_eq!(
                    Tensor::cat(&in_top, 0),
                    alone.in_top,
                    "{world_size} ranks, chunk {chunk}, k {k}"
                );
                for ranking in &of_ranks {
                    assert_eq!(ranking.ranks, alone.ranks);
                    assert!((&ranking.losses - &alone.losses).abs().max().double_value(&[]) < 1e-5);
                }
            }
        }
    }
}

#[test]
fn the_top_is_exact_whatever_the_ties_and_the_chunks() {
    let mut number = session_data::numbers(8);
    // As many distinct scores as here: from one, where only the index decides, to hardly any tie.
    for n_scores in [1, 2, 5, 1000] {
        let values: Vec<f32> = (0..3 * 30).map(|_| number(n_scores) as f32).collect();
        let scores = Tensor::from_slice(&values).view([3, 30]);
        for (n_items, k) in [(30, 20), (30, 1), (12, 20), (3, 20), (2, 20)] {
            let mut expected = vec![false; n_items];
            for row in values.chunks(30) {
                let mut order: Vec<usize> = (2..n_items).collect();
                order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
                order.iter().take(k).for_each(|&item| expected[item] = true);
            }
            for chunk in [1, 2, 7, 30] {
                let slice = |items: std::ops::Range<i64>| {
                    scores.narrow(1, items.start, items.end - items.start)
                };
                let targets = Tensor::from_slice(&[1i64, 1, 1]);
                let ranking = rank_targets(
                    slice,
                    (&targets, &nothing_hidden(3)),
                    &ItemTable::replicated(n_items as i64),
                    chunk,
                    k as i64,
                )
                .unwrap();
                let in_top = Vec::<bool>::try_from(ranking.in_top).unwrap();
                assert_eq!(
                    in_top, expected,
                    "{n_scores} scores, {n_items} items, k {k}, chunk {chunk}"
                );
            }
        }
    }
}

#[test]
fn deciles_are_equal_groups_by_occurrences_then_index() {
    // 0 and 1 may not be recommended, 7 never occurred; 3 and 5 are equally popular.
    let mut occurrences = vec![90, 80, 5, 40, 3, 40, 100, 0];
    let expected = [0, 0, 7, 3, 9, 5, 1, 0];
    assert_eq!(deciles(&occurrences), expected);
    occurrences.resize(8 + 95, 1);
    let deciles = deciles(&occurrences);
    let sizes: Vec<usize> =
        (1..=10).map(|decile| deciles.iter().filter(|&&of| of == decile).count()).collect();
    assert_eq!(sizes, [10; 10]);
    assert!(deciles[8..].is_sorted() && deciles[6] == 1);
}

/// The same figures from all scores at once, sorted, in plain f64; deciles and support are 0.
fn offline(network: &Network, sessions: &[Vec<i64>]) -> Evaluation {
    let (mut ranks, mut recommended) = (Vec::new(), std::collections::BTreeSet::new());
    for block in sessions.chunks(32) {
        let batch = Batch {
            columns: vec![Tensor::from_slice(&block.concat())],
            lengths: block.iter().map(Vec::len).collect(),
            session_seeds: vec![0; block.len()],
            days: vec![0; block.len()],
            step_seed: 0,
            segments: vec![Segment { seed: 0, n_sessions: block.len() }],
        };
        let (known, _) = batch.split_last();
        let scores = network.scores(&network.encode(&known).unwrap(), 0..network.n_items());
        for (row, session) in block.iter().enumerate() {
            let of_row: Vec<f32> = scores.get(row as i64).try_into().unwrap();
            let mut order: Vec<i64> = (2..network.n_items()).collect();
            order.sort_by(|&a, &b| of_row[b as usize].total_cmp(&of_row[a as usize]));
            ranks.push(order.iter().position(|item| item == session.last().unwrap()).unwrap() + 1);
            recommended.extend(order[..20].iter().copied());
        }
    }
    // Exact: how many sessions had each rank, then one product a rank.
    let mean = |k: usize, value: fn(f64) -> f64| {
        let at = |rank: usize| ranks.iter().filter(|&&other| other == rank).count() as f64;
        (1..=k).map(|rank| at(rank) * value(rank as f64)).sum::<f64>() / ranks.len() as f64
    };
    let metrics = Metrics {
        n_sessions: ranks.len() as i64,
        loss: f64::NAN,
        ndcg_at_10: mean(10, |rank| 1.0 / (rank + 1.0).log2()),
        ndcg_at_20: mean(20, |rank| 1.0 / (rank + 1.0).log2()),
        recall_at_10: mean(10, |_| 1.0),
        recall_at_20: mean(20, |_| 1.0),
        mrr_at_20: mean(20, |rank| 1.0 / rank),
    };
    let outcomes = ranks.iter().zip(sessions).map(|(&rank, session)| {
        let (&target, known) = session.split_last().unwrap();
        SessionOutcome {
            rank: rank as i64,
            n_known: known.len() as i64,
            target,
            decile: 0,
            n_repeats: known.iter().filter(|&&item| item == target).count() as i64,
            support: 0,
        }
    });
    let coverage_at_20 = recommended.len() as f64 / (network.n_items() - 2) as f64;
    Evaluation { metrics, coverage_at_20, outcomes: outcomes.collect() }
}

#[test]
fn figures_are_the_same_to_the_last_digit_on_any_number_of_ranks_and_offline() {
    let dir = tempfile::tempdir().unwrap();
    let n_items = 60;
    session_data::write_schema(dir.path(), n_items);
    let sessions = session_data::sessions(333, n_items, 9);
    session_data::write_sessions(&dir.path().join("1/valid.parquet"), &sessions, |_| 0.0);
    let config = DataConfig { first_day: Some(1), last_day: Some(2), ..DataConfig::default() };
    let network = || network(n_items);
    // Items 2 to 41 occurred, the higher the more often.
    let occurrences: Vec<i64> = (0..n_items).map(|item| if item < 42 { item } else { 0 }).collect();
    let on_ranks = |world_size: usize, scores_mib| {
        threads::spawn(world_size, |collective| {
            let days = Days::open(dir.path(), &config).unwrap();
            let file = days.file(1, Split::Valid).unwrap();
            let config = EvaluateConfig { block: 32, scores_mib, ..EvaluateConfig::default() };
            evaluate(
                &network(),
                &ItemTable::replicated(days.features().n_items()),
                &file,
                days.features(),
                &config,
                &occurrences,
                collective,
            )
            .unwrap()
        })
    };
    let alone = on_ranks(1, 256).remove(0);
    let expected = offline(&network(), &sessions);
    let loss = alone.metrics.loss;
    assert_eq!(
        Metrics { loss: 0.0, ..alone.metrics.clone() },
        Metrics { loss: 0.0, ..expected.metrics }
    );
    assert!(loss > 3.0 && loss < 5.0, "{loss}");
    assert_eq!(alone.coverage_at_20, expected.coverage_at_20);
    // Twenty of 58 items are in the top of one session, and no two sessions are quite alike.
    assert!((20.0 / 58.0..1.0).contains(&alone.coverage_at_20), "{}", alone.coverage_at_20);
    let deciles = deciles(&occurrences);
    let expected = expected.outcomes.into_iter();
    let expected: Vec<_> = expected
        .map(|outcome| SessionOutcome {
            decile: deciles[outcome.target as usize],
            support: occurrences[outcome.target as usize],
            ..outcome
        })
        .collect();
    assert_eq!(alone.outcomes, expected);
    assert!(expected.iter().any(|outcome| outcome.n_repeats > 0));
    assert!(expected.iter().any(|outcome| outcome.support == 0));
    // With 13 there are more ranks than blocks: some have nothing to evaluate.
    for (world_size, scores_mib) in [(2, 256), (3, 256), (4, 256), (13, 1)] {
        for (rank, evaluation) in on_ranks(world_size, scores_mib).into_iter().enumerate() {
            assert_eq!(evaluation.metrics, alone.metrics);
            assert_eq!(evaluation.coverage_at_20, alone.coverage_at_20);
            let none = Vec::new();
            assert_eq!(&evaluation.outcomes, if rank == 0 { &alone.outcomes } else { &none });
        }
    }
}

/// Evaluates sessions with a network of 60 items on some ranks, by blocks of 32 cases.
fn evaluated(sessions: &[Vec<i64>], config: &EvaluateConfig, n_ranks: usize) -> Vec<Evaluation> {
    let n_items = 60;
    let dir = tempfile::tempdir().unwrap();
    session_data::write_schema(dir.path(), n_items);
    session_data::write_sessions(&dir.path().join("1/valid.parquet"), sessions, |_| 0.0);
    let data = DataConfig { first_day: Some(1), last_day: Some(2), ..DataConfig::default() };
    let config = EvaluateConfig { block: 32, ..config.clone() };
    threads::spawn(n_ranks, |collective| {
        let days = Days::open(dir.path(), &data).unwrap();
        let file = days.file(1, Split::Valid).unwrap();
        let table = ItemTable::replicated(n_items);
        let occurrences = vec![1; n_items as usize];
        let model = network(n_items);
        let features = days.features();
        evaluate(&model, &table, &file, features, &config, &occurrences, collective).unwrap()
    })
}

#[test]
fn every_item_but_the_first_is_a_case_if_that_is_wanted() {
    // One session has more than the twenty events that are read, and some items are unknown.
    let mut sessions = session_data::sessions(150, 60, 9);
    sessions.push((0..33).map(|i| 2 + i * 7 % 58).collect());
    for session in sessions.iter_mut().step_by(5) {
        *session.last_mut().unwrap() = 1;
    }
    let prefixes: Vec<Vec<i64>> = sessions
        .iter()
        .flat_map(|session| (2..=session.len()).map(|n| session[..n].to_vec()))
        .collect();
    let without_loss = |evaluation: &Evaluation| Evaluation {
        metrics: Metrics { loss: 0.0, ..evaluation.metrics.clone() },
        ..evaluation.clone()
    };
    for unknown_targets in [UnknownTargets::Count, UnknownTargets::LeaveOut] {
        let every = EvaluateConfig { cases: Cases::Every, unknown_targets, ..Default::default() };
        let last = EvaluateConfig { unknown_targets, ..Default::default() };
        let of_sessions = evaluated(&sessions, &every, 1).remove(0);
        let of_prefixes = evaluated(&prefixes, &last, 1).remove(0);
        assert_eq!(without_loss(&of_sessions), without_loss(&of_prefixes));
        let losses = (of_sessions.metrics.loss, of_prefixes.metrics.loss);
        assert!((losses.0 - losses.1).abs() < 1e-5, "{losses:?}");
        let n_cases = match unknown_targets {
            UnknownTargets::Count => prefixes.len(),
            UnknownTargets::LeaveOut => {
                prefixes.iter().filter(|prefix| *prefix.last().unwrap() > 1).count()
            }
        };
        assert_eq!(of_sessions.metrics.n_sessions, n_cases as i64);
        for n_ranks in [2, 3] {
            let on_ranks = evaluated(&sessions, &every, n_ranks);
            assert_eq!(on_ranks[0], of_sessions, "{n_ranks} ranks");
            assert!(on_ranks.iter().all(|on_rank| on_rank.metrics == of_sessions.metrics));
        }
    }
}

#[test]
fn outcomes_count_the_repeats_and_the_support_of_known_items() {
    let dir = tempfile::tempdir().unwrap();
    session_data::write_schema(dir.path(), 10);
    // The index 1 of the last session stands for two unknown items.
    let sessions = [vec![5, 6, 5], vec![7, 8, 3], vec![4, 2, 4, 4], vec![2, 9], vec![1, 7, 1]];
    session_data::write_sessions(&dir.path().join("1/valid.parquet"), &sessions, |_| 0.0);
    let occurrences = [0, 50, 6, 1, 0, 3, 9, 9, 9, 0];
    let config = DataConfig { first_day: Some(1), last_day: Some(2), ..DataConfig::default() };
    let evaluation = threads::spawn(1, |collective| {
        let days = Days::open(dir.path(), &config).unwrap();
        let file = days.file(1, Split::Valid).unwrap();
        evaluate(
            &network(10),
            &ItemTable::replicated(10),
            &file,
            days.features(),
            &EvaluateConfig::default(),
            &occurrences,
            collective,
        )
        .unwrap()
    })
    .remove(0);
    let of_outcome = |outcome: &SessionOutcome| (outcome.n_repeats, outcome.support);
    let counts: Vec<_> = evaluation.outcomes.iter().map(of_outcome).collect();
    assert_eq!(counts, [(1, 3), (0, 1), (2, 0), (0, 0), (0, 0)]);
}

#[test]
fn occurrences_of_all_ranks_are_those_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    session_data::write_schema(dir.path(), 60);
    let sessions = session_data::sessions(333, 60, 9);
    session_data::write_sessions(&dir.path().join("1/train.parquet"), &sessions, |_| 0.0);
    let mut expected = vec![0; 60];
    sessions.iter().flatten().for_each(|&item| expected[item as usize] += 1);
    let config = DataConfig { first_day: Some(1), last_day: Some(2), ..DataConfig::default() };
    let days = Days::open(dir.path(), &config).unwrap();
    let file = days.file(1, Split::Train).unwrap();
    for world_size in [1, 2, 3, 400] {
        let of_ranks = (0..world_size)
            .map(|rank| occurrences(&file, days.features(), (rank, world_size)).unwrap());
        let sum = of_ranks.reduce(|a, b| a.iter().zip(&b).map(|(a, b)| a + b).collect()).unwrap();
        assert_eq!(sum, expected, "{world_size} ranks");
    }
}

#[test]
fn a_file_without_sessions_has_no_figures() {
    let dir = tempfile::tempdir().unwrap();
    session_data::write_schema(dir.path(), 10);
    session_data::write_sessions(&dir.path().join("1/valid.parquet"), &[], |_| 0.0);
    let config = DataConfig { first_day: Some(1), last_day: Some(2), ..DataConfig::default() };
    for evaluation in threads::spawn(2, |collective| {
        let days = Days::open(dir.path(), &config).unwrap();
        let file = days.file(1, Split::Valid).unwrap();
        let network = network(10);
        let config = EvaluateConfig::default();
        evaluate(
            &network,
            &ItemTable::replicated(10),
            &file,
            days.features(),
            &config,
            &[0; 10],
            collective,
        )
        .unwrap()
    }) {
        let metrics = evaluation.metrics;
        assert!(evaluation.outcomes.is_empty());
        assert_eq!(metrics.n_sessions, 0);
        assert!(metrics.ndcg_at_10.is_nan() && metrics.loss.is_nan());
        assert!(serde_json::to_string(&metrics).unwrap().contains("\"ndcg_at_10\":null"));
    }
}
