//! Baselines count as written, the same on any number of ranks and after a checkpoint.

use std::collections::BTreeMap;
use std::fs;

use bireme::data::{DataConfig, Days, Split, evaluation_batches};
use bireme::model::{
    Baseline, BaselineKind, CountingModel, Decay, Neighbours, NeighboursConfig, Recommender,
};

use crate::support::configs::config_with;
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
    let mut rows = Vec::new();
    for batch in evaluation_batches(&file, days.features(), 2, (0, 1)).unwrap() {
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
