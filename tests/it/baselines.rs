//! Baselines count as written, the same on any number of ranks and after a checkpoint.

use std::collections::BTreeMap;
use std::fs;

use bireme::collective::threads;
use bireme::config::{Cases, EvaluateConfig};
use bireme::data::{DataConfig, Days, Split, evaluation_batches};
use bireme::metrics::evaluate;
use bireme::model::{
    Baseline, BaselineKind, CountingModel, Decay, ItemTable, Neighbours, NeighboursConfig,
    Recommender,
};

use crate::support::configs::config_with;
use crate::support::requirements::shared;
use crate::support::session_data;
use crate::support::session_shop::{SessionShop, timeless};

const N_ITEMS: i64 = 10;

/// The scores `[B][V]` after the known parts `known` of sessions, read from a file as the evaluator
/// reads them.
fn scores(model: &Baseline, known: &[&[i64]]) -> Vec<Vec<f64>> {
    let dir = tempfile::tempdir().unwrap();
    session_data::write_schema(dir.path(), N_ITEMS);
    let sessions: Vec<Vec<i64>> = known.iter().map(|known| [known, &[2][..]].concat()).collect();
    session_data::write_sessions(&dir.path().join("1/valid.parquet"), &sessions, |_| 0.0);
    let config = DataConfig { first_day: Some(1), last_day: Some(2), ..DataConfig::default() };
    let days = Days::open(dir.path(), &config).unwrap();
    let file = days.file(1, Split::Valid).unwrap();
    let in_twos = EvaluateConfig { block: 2, ..EvaluateConfig::default() };
    let mut rows = Vec::new();
    for batch in evaluation_batches(&file, days.features(), &in_twos, (0, 1)).unwrap() {
        let encoded = model.encode(&batch.split_last().0).unwrap();
        let whole: Vec<Vec<f64>> = model.scores(&encoded, 0..N_ITEMS).try_into().unwrap();
        for cut in 1..N_ITEMS {
            let left: Vec<Vec<f64>> = model.scores(&encoded, 0..cut).try_into().unwrap();
            let right: Vec<Vec<f64>> = model.scores(&encoded, cut..N_ITEMS).try_into().unwrap();
            let both: Vec<_> =
                left.iter().zip(&right).map(|(left, right)| [&left[..], right].concat()).collect();
            assert_eq!(both, whole, "cut at {cut}");
        }
        rows.extend(whole);
    }
    rows
}

fn add_day(model: &mut Baseline, sessions: &[&[i64]]) {
    model.add_sessions(sessions.iter().copied());
}

/// Four sessions in two days: items 2 to 8 occur 1, 2, 2, 1, 2, 1 and 1 times, item 9 never.
fn counted(evidence: BaselineKind) -> Baseline {
    let mut model = Baseline::new(evidence, N_ITEMS);
    add_day(&mut model, &[&[2, 3, 4], &[3, 5]]);
    add_day(&mut model, &[&[4, 6, 6], &[7, 8]]);
    model
}

/// A third of each count, since the largest is 2.
const POPULARITY: [f64; 10] =
    [0.0, 0.0, 1.0 / 3.0, 2.0 / 3.0, 2.0 / 3.0, 1.0 / 3.0, 2.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0, 0.0];

fn linear() -> NeighboursConfig {
    NeighboursConfig {
        k: 100,
        sample_size: 1000,
        weighting: Decay::Linear,
        score_weighting: Decay::Linear,
        idf_weight: 0.0,
    }
}

fn vsknn(config: &NeighboursConfig) -> BaselineKind {
    BaselineKind::Neighbours(Neighbours::new(config, N_ITEMS))
}

/// 1 + the score of each item that a neighbour holds, popularity of the others.
fn assert_vsknn(config: &NeighboursConfig, known: &[i64], expected: &[(usize, f64)]) {
    let mut all = POPULARITY;
    for &(item, score) in expected {
        all[item] = 1.0 + score;
    }
    let of_session = &scores(&counted(vsknn(config)), &[known])[0];
    for (item, (score, expected)) in of_session.iter().zip(all).enumerate() {
        assert!(
            (score - expected).abs() < 1e-12,
            "{config:?} {known:?} item {item}: {score}, not {expected}"
        );
    }
}

#[test]
fn neighbours_score_as_by_hand() {
    // The unknown item 1 does not count, so 2, 3 and 4 are positions 1 to 3 and weigh 0.8, 0.9 and
    // 1. The similarities are (0.8 + 0.9 + 1) / 3 = 0.9 for [2, 3, 4], 0.9 / 3 = 0.3 for [3, 5] and
    // 1 / 3 for [4, 6]. The last shared item is the last but for [3, 5], where it is the last but
    // one: 0.9 · 0.9 = 0.81, 0.3 · 0.8 = 0.24, 1/3 · 0.9 = 0.3.
    let known = [2, 3, 1, 4];
    let all = [(2, 0.81), (3, 1.05), (4, 1.11), (5, 0.24), (6, 0.3)];
    assert_vsknn(&linear(), &known, &all);
    let two = NeighboursConfig { k: 2, ..linear() };
    assert_vsknn(&two, &known, &[(2, 0.81), (3, 0.81), (4, 1.11), (6, 0.3)]);
    let recent = NeighboursConfig { k: 2, sample_size: 2, ..linear() };
    assert_vsknn(&recent, &known, &[(3, 0.24), (4, 0.3), (5, 0.24), (6, 0.3)]);

    // Weights 1/3, 2/3 and 1: similarities 2/3, 2/9 and 1/3; that of [3, 5] counts half.
    let div = NeighboursConfig { weighting: Decay::Div, score_weighting: Decay::Div, ..linear() };
    let expected = [(2, 2.0 / 3.0), (3, 7.0 / 9.0), (4, 1.0), (5, 1.0 / 9.0), (6, 1.0 / 3.0)];
    assert_vsknn(&div, &known, &expected);

    // Of four sessions one holds 2, 5 and 6, and two hold 3 and 4.
    let idf = NeighboursConfig { idf_weight: 2.0, ..linear() };
    let (one, two) = (1.0 + 2.0 * 4f64.ln(), 1.0 + 2.0 * 2f64.ln());
    let factors = [one, two, two, one, one];
    let expected: Vec<_> =
        all.iter().zip(factors).map(|(&(item, score), idf)| (item, score * idf)).collect();
    assert_vsknn(&idf, &known, &expected);

    // An item counts once, where it was last: 3 weighs 0.9 and 4 weighs 1, and two items are
    // distinct.
    let expected = [(2, 0.855), (3, 0.855 + 0.36), (4, 0.855 + 0.45), (5, 0.36), (6, 0.45)];
    assert_vsknn(&linear(), &[4, 3, 4], &expected);

    // Of [2, 3, 4] and [4, 6], which are as similar, the later is the neighbour.
    assert_vsknn(&NeighboursConfig { k: 1, ..linear() }, &[4], &[(4, 0.9), (6, 0.9)]);
}

#[test]
fn decays_are_as_written() {
    let of_position = |decay: Decay| [1, 9, 10].map(|p| decay.of_position(p, 10));
    let of_distance = |decay: Decay| [1, 2, 12].map(|d| decay.of_distance(d));
    for (decay, positions, distances) in [
        (Decay::Same, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        (Decay::Linear, [0.1, 0.9, 1.0], [0.9, 0.8, 0.0]),
        (Decay::Div, [0.1, 0.9, 1.0], [1.0, 0.5, 1.0 / 12.0]),
        (Decay::Quadratic, [0.01, 0.81, 1.0], [1.0, 0.25, 1.0 / 144.0]),
        (
            Decay::Log,
            [1.0 / 10.7f64.log10(), 1.0 / 2.7f64.log10(), 1.0 / 1.7f64.log10()],
            [1.0 / 2.7f64.log10(), 1.0 / 3.7f64.log10(), 1.0 / 13.7f64.log10()],
        ),
    ] {
        let pairs = of_position(decay).into_iter().zip(positions);
        for (value, expected) in pairs.chain(of_distance(decay).into_iter().zip(distances)) {
            assert!((value - expected).abs() < 1e-12, "{decay:?}: {value}, not {expected}");
        }
    }
    // Further back than ten items, linear weights stay at nothing.
    assert_eq!(Decay::Linear.of_position(1, 20), 0.0);
}

#[test]
fn a_session_of_unknown_items_gets_the_most_popular() {
    for evidence in
        [BaselineKind::None, BaselineKind::Successors(BTreeMap::new()), vsknn(&linear())]
    {
        let of_sessions = scores(&counted(evidence), &[&[1], &[9], &[1, 9, 1]]);
        assert_eq!(of_sessions, vec![POPULARITY.to_vec(); 3]);
    }
    let nothing_yet = scores(&Baseline::new(vsknn(&linear()), N_ITEMS), &[&[3, 4]]);
    assert_eq!(nothing_yet, [vec![0.0; 10]]);
}

#[test]
fn pairs_score_above_popularity() {
    let mut expected = POPULARITY;
    expected[4] += 1.0;
    expected[5] += 1.0;
    assert_eq!(scores(&counted(BaselineKind::Successors(BTreeMap::new())), &[&[2, 3]]), [expected]);
}

#[test]
fn recent_popularity_counts_the_last_day_only() {
    let mut model = counted(BaselineKind::LastDay(Vec::new()));
    let mut expected = POPULARITY;
    for (item, n) in [(4, 1.0), (6, 2.0), (7, 1.0), (8, 1.0)] {
        expected[item] += n;
    }
    assert_eq!(scores(&model, &[&[3]]), [expected]);
    // A day later 6 has sunk below what that day had, however often it occurred before.
    add_day(&mut model, &[&[9, 5]]);
    let later = &scores(&model, &[&[3]])[0];
    let mut order: Vec<usize> = (2..10).collect();
    order.sort_by(|&a, &b| later[b].total_cmp(&later[a]));
    assert_eq!(order, [5, 9, 3, 4, 6, 2, 7, 8]);
}

#[test]
fn counts_are_restored_from_tensors() {
    let kinds: [fn() -> BaselineKind; 4] = [
        || BaselineKind::None,
        || BaselineKind::LastDay(Vec::new()),
        || BaselineKind::Successors(BTreeMap::new()),
        || vsknn(&linear()),
    ];
    let known: [&[i64]; 4] = [&[2, 3, 4], &[6], &[1], &[9, 7]];
    for evidence in kinds {
        let model = counted(evidence());
        let mut loaded = Baseline::new(evidence(), N_ITEMS);
        loaded.load(&model.tensors()).unwrap();
        assert_eq!(scores(&loaded, &known), scores(&model, &known));
        // Then training continues as if it had not been interrupted.
        let [mut model, mut loaded] = [model, loaded];
        for model in [&mut model, &mut loaded] {
            add_day(model, &[&[4, 9]]);
        }
        assert_eq!(scores(&loaded, &known), scores(&model, &known));

        let refused =
            |n_items, tensors: &[_]| Baseline::new(evidence(), n_items).load(tensors).unwrap_err();
        assert_eq!(refused(9, &model.tensors()), "`items` counts 10 items, the schema has 9");
        assert_eq!(refused(N_ITEMS, &[]), "tensor `items` is missing");
    }
    let mut tensors = counted(vsknn(&linear())).tensors();
    let lengths = tensors.pop().unwrap();
    let load = |tensors: &[_]| Baseline::new(vsknn(&linear()), N_ITEMS).load(tensors);
    assert_eq!(load(&tensors).unwrap_err(), "tensor `session_lengths` is missing");
    tensors.push((lengths.0, lengths.1 + 1));
    assert_eq!(load(&tensors).unwrap_err(), "`session_lengths` does not fit `session_items`");
}

fn set_kind(shop: &SessionShop, kind: &str) {
    fs::write(shop.config(), config_with(&format!("kind = \"{kind}\""))).unwrap();
}

#[test]
fn counts_are_the_same_on_any_number_of_ranks_and_sessions_beat_popularity() {
    let shop = SessionShop::new(300);
    let mut recall = Vec::new();
    for kind in ["popularity", "recent", "markov", "vsknn", "loglinear"] {
        set_kind(&shop, kind);
        shop.train(kind, &[]).success();
        let evals = shop.evaluations(kind);
        recall.push(evals[1]["recall_at_10"].as_f64().unwrap());

        let finished = shop.evaluate(kind, &[]).success();
        assert_eq!(timeless(serde_json::from_str(&finished.stdout).unwrap()), evals[1], "{kind}");

        let weights =
            |run: &str| fs::read(shop.newest_checkpoint(run).join("weights.safetensors")).unwrap();
        for n_ranks in [2, 3] {
            let run = format!("{kind} {n_ranks}");
            let Some(finished) = shop.train_on(n_ranks, &run, &[]) else { continue };
            finished.success();
            assert_eq!(shop.evaluations(&run), evals, "{run}");
            assert!(weights(&run) == weights(kind), "{run}");
        }
    }
    let [popularity, recent, markov, vsknn, loglinear] = recall[..] else { unreachable!() };
    assert!(markov.min(vsknn).min(loglinear) > popularity.max(recent) + 0.2, "{recall:?}");
}

#[test]
fn impossible_neighbours_are_refused() {
    let shop = SessionShop::new(20);
    set_kind(&shop, "vsknn");
    for (assignment, message) in [
        ("model.k=0", "`k` must be at least 1"),
        ("model.sample_size=50", "`sample_size` 50 is less than `k` 500"),
        ("model.idf_weight=-1", "`idf_weight` cannot be -1"),
        ("model.idf_weight=inf", "`idf_weight` cannot be inf"),
        ("model.weighting=cubic", "`cubic`"),
        (
            "model.sample=9",
            "unknown key `model.sample` in the configuration: did you mean `model.sample_size`?",
        ),
    ] {
        let finished = shop.train("run", &["--set", assignment]);
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert!(finished.stderr.contains(message), "{message}\n{finished:#?}");
    }
    assert!(!shop.run_dir("run").exists());
}

/// Recall@20 and MRR@20 of the most frequent successors of the last item, then the most frequent
/// items, the lower index first among equals, counted without the model.
fn recounted(train: &[Vec<i64>], tested: &[Vec<i64>], n_items: usize) -> (f64, f64) {
    let mut n_occurrences = vec![0i64; n_items];
    let mut successors: BTreeMap<i64, BTreeMap<i64, i64>> = BTreeMap::new();
    for session in train {
        for &item in session {
            n_occurrences[item as usize] += 1;
        }
        for pair in session.windows(2) {
            *successors.entry(pair[0]).or_default().entry(pair[1]).or_default() += 1;
        }
    }
    let mut by_occurrences: Vec<i64> = (2..n_items as i64).collect();
    by_occurrences.sort_by_key(|&item| (-n_occurrences[item as usize], item));
    let (mut n_cases, mut n_hits, mut reciprocals) = (0, 0, 0.0);
    for pair in tested.iter().flat_map(|session| session.windows(2)) {
        let mut top: Vec<(i64, i64)> = successors
            .get(&pair[0])
            .into_iter()
            .flatten()
            .filter(|(item, _)| **item >= 2)
            .map(|(&item, &n)| (item, n))
            .collect();
        top.sort_by_key(|&(item, n)| (-n, -n_occurrences[item as usize], item));
        let successors: Vec<i64> = top.into_iter().map(|(item, _)| item).collect();
        let others = by_occurrences.iter().filter(|item| !successors.contains(item));
        let rank = successors.iter().chain(others).take(20).position(|&item| item == pair[1]);
        n_cases += 1;
        if let Some(rank) = rank {
            n_hits += 1;
            reciprocals += 1.0 / (rank + 1) as f64;
        }
    }
    (f64::from(n_hits) / f64::from(n_cases), reciprocals / f64::from(n_cases))
}

#[test]
fn successors_on_public_sets_are_those_of_a_recount() {
    let Some(shared) = shared() else { return };
    // Of two sets, a tenth of the test sessions: all of them would take a minute.
    for (set, step) in [("rsc15_64", 1), ("yoochoose1_64", 10), ("diginetica", 10)] {
        let source = shared.join("data/public").join(set);
        let config = DataConfig {
            first_day: Some(1),
            last_day: Some(2),
            max_length: 1000,
            ..DataConfig::default()
        };
        let days = Days::open(&source, &config).unwrap();
        let n_items = days.features().n_items();
        let sessions_of = |day: i64, split: Split| -> Vec<Vec<i64>> {
            let file = days.file(day, split).unwrap();
            let sessions = file.read(&file.spans(0..file.n_sessions())).unwrap();
            (0..sessions.len()).map(|row| sessions.ids(0, row).to_vec()).collect()
        };
        let train = sessions_of(1, Split::Train);
        // A row of the test file is a prefix. Those of a session lie together, the shortest or the
        // longest first.
        let mut prefixes = sessions_of(2, Split::Test);
        let n_longer = prefixes.windows(2).filter(|pair| pair[1].starts_with(&pair[0])).count();
        if n_longer < prefixes.len() / 2 {
            prefixes.reverse();
        }
        let is_whole = |n: usize| match prefixes.get(n + 1) {
            Some(next) => next.len() != prefixes[n].len() + 1 || !next.starts_with(&prefixes[n]),
            None => true,
        };
        let tested: Vec<Vec<i64>> =
            (0..prefixes.len()).filter(|&n| is_whole(n)).map(|n| prefixes[n].clone()).collect();
        let n_cases_of =
            |sessions: &[Vec<i64>]| sessions.iter().map(|x| x.len() - 1).sum::<usize>();
        assert_eq!(n_cases_of(&tested), prefixes.len());
        let tested: Vec<Vec<i64>> = tested.into_iter().step_by(step).collect();

        let dir = tempfile::tempdir().unwrap();
        session_data::write_schema(dir.path(), n_items);
        session_data::write_sessions(&dir.path().join("2/test.parquet"), &tested, |_| 0.0);
        let mut model = Baseline::new(BaselineKind::Successors(BTreeMap::new()), n_items);
        model.add_sessions(train.iter().map(Vec::as_slice));
        let config = DataConfig { max_length: 20, ..config };
        let evaluation = threads::spawn(2, |collective| {
            let days = Days::open(dir.path(), &config).unwrap();
            let every = EvaluateConfig { cases: Cases::Every, ..EvaluateConfig::default() };
            evaluate(
                &model,
                &ItemTable::replicated(n_items),
                &days.file(2, Split::Test).unwrap(),
                days.features(),
                &every,
                &vec![0; n_items as usize],
                collective,
            )
            .unwrap()
        })
        .remove(0);
        let (recall, mrr) = recounted(&train, &tested, n_items as usize);
        let metrics = &evaluation.metrics;
        assert_eq!(metrics.n_sessions, n_cases_of(&tested) as i64, "{set}");
        println!("{set}: Recall@20 {recall:.4}, MRR@20 {mrr:.4}");
        assert!((metrics.recall_at_20 - recall).abs() < 1e-12, "{set}: {metrics:?} {recall}");
        assert!((metrics.mrr_at_20 - mrr).abs() < 1e-12, "{set}: {metrics:?} {mrr}");
    }
}
