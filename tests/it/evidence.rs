//! Counts as features of candidates: what they contain, and the gradients of the term of the scores
//! from them.

use std::collections::BTreeMap;
use std::ops::Range;

use bireme::collective::phase_timer::PhaseTimer;
use bireme::config::{CandidatesConfig, EvaluateConfig, EvidenceConfig, Reminders};
use bireme::data::{Batch, DataConfig, Days, Features, Sessions, with_seed};
use bireme::model::head::{
    CrossEntropy, Logits, NegativeSampler, Negatives, ScoringTable, Targets, Workspace,
    cross_entropy, uniform_numbers,
};
use bireme::model::{
    CandidateIndex, Candidates, Encoded, GruConfig, HeadConfig, ItemTable, LossConfig, Network,
    NoHooks, Recommender, SparseScores,
};
use tch::{Device, Kind, Tensor};

use crate::support::one_day::{N_ITEMS, OneDay, data_config};
use crate::support::session_data::{self, COLOUR, PRICE};
use crate::support::tensors::distance;

/// An index of the train file of day 1.
fn index(shop: &OneDay, config: &CandidatesConfig, reminders: Reminders) -> CandidateIndex {
    let mut index =
        CandidateIndex::new(config, shop.features(), reminders, 20, Device::Cpu).unwrap();
    index.add_day(1, &shop.file()).unwrap();
    index
}

/// Few frequent items, so that nearly all candidates come from pairs.
fn candidates_config() -> CandidatesConfig {
    CandidatesConfig {
        n_frequent: 1,
        attributes: Some(vec![COLOUR.to_owned(), PRICE.to_owned()]),
        ..CandidatesConfig::default()
    }
}

fn batch(sessions: &Sessions, rows: Range<usize>, features: &Features) -> Batch {
    Batch::new(&rows.map(|row| (sessions, row)).collect::<Vec<_>>(), features)
}

/// The features of each candidate of the first session.
fn by_item(candidates: &Candidates) -> BTreeMap<i64, Tensor> {
    let items = Vec::<i64>::try_from(candidates.items.get(0)).unwrap();
    let features = (0..).map(|place| candidates.features.get(0).get(place));
    items.into_iter().zip(features).filter(|(item, _)| *item > 0).collect()
}

#[test]
fn a_session_is_left_out_of_the_counts_of_its_own_targets() {
    let mut sessions = session_data::sessions(60, N_ITEMS, 5);
    sessions.retain(|session| session.iter().all(|&item| item != 39));
    // The target 39 occurs nowhere else, and neither does the repeated pair of 5 and 7.
    sessions.push(vec![5, 7, 5, 7, 11, 39]);
    let shop = OneDay::new(&sessions);
    let all = index(&shop, &candidates_config(), Reminders::All);
    let read = shop.sessions();
    for row in (0..10).chain([sessions.len() - 1]) {
        let batch = batch(&read, row..row + 1, shop.features());
        let (known, target) = batch.split_last();
        let training = by_item(&all.of_targets(&[batch.n_events() as i64 - 1], &batch));

        let others: Vec<Vec<i64>> = sessions
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != row)
            .map(|(_, s)| s.clone())
            .collect();
        let without = index(&OneDay::new(&others), &candidates_config(), Reminders::All);
        let unseen = by_item(&without.of_next(&known));
        for (item, features) in &training {
            if let Some(expected) = unseen.get(item) {
                assert!(distance(features, expected) < 1e-5, "{row} {item} {features} {expected}");
            }
        }
        // The lists of frequent items alone may differ: they count the session itself.
        let differing = |a: &BTreeMap<i64, Tensor>, b: &BTreeMap<i64, Tensor>| {
            a.keys().filter(|item| !b.contains_key(item)).count()
        };
        assert!(differing(&training, &unseen) <= 2 && differing(&unseen, &training) <= 2, "{row}");
        if row == sessions.len() - 1 {
            assert_eq!(target.int64_value(&[0]), 39);
            assert!(!training.contains_key(&39), "the target is seen");
        }
    }
}

#[test]
fn candidates_are_neighbours_known_items_and_frequent_ones() {
    let sessions = vec![vec![2, 3, 4], vec![2, 3], vec![9, 3, 8], vec![30, 31], vec![30, 31]];
    let shop = OneDay::new(&sessions);
    let known = |items: &[i64]| {
        // The last item is the target.
        let read = OneDay::new(&[[items, &[2]].concat()]).sessions();
        batch(&read, 0..1, shop.features()).split_last().0
    };
    let items = |reminders, config: &CandidatesConfig, of: &[i64]| {
        let candidates = index(&shop, config, reminders).of_next(&known(of));
        let hidden = candidates.items.masked_select(&candidates.is_hidden);
        let mut hidden = Vec::<i64>::try_from(hidden).unwrap();
        hidden.sort_unstable();
        (by_item(&candidates).into_keys().collect::<Vec<_>>(), hidden)
    };
    let config = CandidatesConfig { attributes: Some(Vec::new()), ..candidates_config() };
    // 2 and 9 precede 3, 4 and 8 follow it; 3 is the most frequent item; 20 is known.
    let expected = vec![2, 3, 4, 8, 9, 20];
    assert_eq!(items(Reminders::All, &config, &[20, 3]), (expected.clone(), vec![]));
    assert_eq!(items(Reminders::Earlier, &config, &[20, 3]), (expected.clone(), vec![3]));
    assert_eq!(items(Reminders::None, &config, &[20, 3]), (expected, vec![3, 20]));
    // Items of the colour of 37, which has not occurred, are candidates by their attribute alone.
    let same_colour: Vec<i64> = [2, 9, 30].into_iter().filter(|item| item % 7 == 37 % 7).collect();
    let config = CandidatesConfig { n_frequent: 8, ..candidates_config() };
    let (found, _) = items(Reminders::All, &config, &[37]);
    assert!(!same_colour.is_empty() && same_colour.iter().all(|item| found.contains(item)));
    let few = CandidatesConfig { n_candidates: 2, ..candidates_config() };
    assert_eq!(items(Reminders::All, &few, &[20, 3]).0, [3, 20]);
}

/// Random states `[n, 6]`, table `[V, 6]`, bias `[V]`, targets `[n]` and sparse scores `[n, 5]`.
fn scored(n: i64) -> (Tensor, Tensor, Tensor, Tensor, SparseScores) {
    with_seed(3, || randomly_scored(n))
}

fn randomly_scored(n: i64) -> (Tensor, Tensor, Tensor, Tensor, SparseScores) {
    let randn = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu));
    // The first target is among the items with sparse scores, and the last place is empty.
    let items: Vec<i64> = (0..n).flat_map(|row| [2 + row, 10 + row, 20, 30 + row % 9, 0]).collect();
    let targets: Vec<i64> = (0..n).map(|row| if row % 2 == 0 { 2 + row } else { 25 }).collect();
    let sparse =
        SparseScores { items: Tensor::from_slice(&items).view([n, 5]), scores: randn(&[n, 5]) };
    (randn(&[n, 6]), randn(&[N_ITEMS, 6]), randn(&[N_ITEMS]), Tensor::from_slice(&targets), sparse)
}

/// Of the targets of [`scored`].
const MICRO_BATCHES: [i64; 8] = [0, 0, 0, 1, 1, 1, 1, 1];

/// Loss and gradients of states, table, bias and sparse scores by [`cross_entropy`].
fn with_gradients(negatives: &Negatives) -> (f64, [Tensor; 4]) {
    let (states, weights, bias, targets, sparse) = scored(8);
    let item_table = ItemTable::replicated(N_ITEMS);
    let (weight_gradient, bias_gradient) = (weights.zeros_like(), bias.zeros_like());
    let mut table = ScoringTable {
        weights,
        bias,
        items: None,
        weight_gradient: weight_gradient.shallow_clone(),
        bias_gradient: bias_gradient.shallow_clone(),
        row_lists: None,
        item_table: &item_table,
        counts: &[8],
        group_added: &mut || (),
    };
    let workspace = &mut Workspace::default();
    let encoded = Encoded { vectors: states, sparse: Some(sparse) };
    let micro_batches = Tensor::from_slice(&MICRO_BATCHES);
    let targets = Targets { items: targets, micro_batches, weights: None, uniform: None };
    let result = cross_entropy(&encoded, &targets, &mut table, negatives, workspace);
    let CrossEntropy { loss, state_gradient, sparse_gradient, .. } = result.unwrap();
    let sparse_gradient = sparse_gradient.unwrap();
    (loss.double_value(&[]), [state_gradient, weight_gradient, bias_gradient, sparse_gradient])
}

/// The same by autograd from all logits `[n, V]`; `loss` gives the loss from them and from the
/// targets.
fn by_autograd(loss: impl Fn(&Tensor, &Tensor) -> Tensor) -> (f64, [Tensor; 4]) {
    let (states, weights, bias, targets, sparse) = scored(8);
    let leaves = [&states, &weights, &bias, &sparse.scores].map(|x| x.set_requires_grad(true));
    let [states, weights, bias, scores] = &leaves;
    let is_item = sparse.items.gt(0).to_kind(Kind::Float);
    let from_vectors = states.matmul(&weights.tr()) + bias;
    let spread = |x: &Tensor| from_vectors.zeros_like().scatter_add(1, &sparse.items, x);
    let logits = &from_vectors * (1.0 - spread(&is_item)) + spread(&(scores * &is_item));
    let loss = loss(&logits, &targets);
    let gradients = Tensor::run_backward(&[&loss], &leaves.each_ref(), false, false);
    (loss.double_value(&[]), gradients.try_into().unwrap())
}

#[test]
fn sparse_scores_are_part_of_the_loss_over_the_catalogue() {
    for (label_smoothing, most) in [(0.0, 1 << 20), (0.2, 1 << 20), (0.0, 64), (0.1, 64)] {
        let logits = Logits { kind: Kind::Float, most };
        let (loss, gradients) = with_gradients(&Negatives::Full { label_smoothing, logits });
        let (expected, expected_gradients) = by_autograd(|logits, targets| {
            let weight = None::<&Tensor>;
            logits.cross_entropy_loss(targets, weight, tch::Reduction::Sum, -100, label_smoothing)
        });
        assert!((loss - expected).abs() < 1e-4, "{label_smoothing} {most}: {loss} {expected}");
        for (number, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate()
        {
            assert!(distance(gradient, expected) < 1e-5, "{label_smoothing} {most}: {number}");
        }
    }
}

/// The loss of a target by autograd, from its logit and those of its negatives: sampled ones with
/// their expected counts, and those with sparse scores.
type LossOfTarget = fn(&Tensor, &[(Tensor, f64)], &[Tensor]) -> Tensor;

fn assert_negatives_are_sampled_and_sparse(
    loss: LossConfig,
    uniform: f64,
    in_batch: bool,
    of_target: LossOfTarget,
) {
    let logits = Logits { kind: Kind::Float, most: 1 << 20 };
    let occurrences: Vec<i64> = (0..N_ITEMS).collect();
    let sampler = NegativeSampler::new(loss, &occurrences, logits, Device::Cpu);
    let negatives = sampler.negatives(&uniform_numbers(sampler.n_sampled(), 7));
    let Negatives::Sampled { items, .. } = &negatives else { unreachable!() };
    let sampled = Vec::<i64>::try_from(items).unwrap();
    let weight = |item: i64| if item < 2 { 0.0 } else { ((item + 1) as f64).sqrt() };
    let total: f64 = (0..N_ITEMS).map(weight).sum();
    let expected_count = |item: i64| {
        12.0 * ((1.0 - uniform) * weight(item) / total + uniform / (N_ITEMS - 2) as f64)
    };

    let (loss, gradients) = with_gradients(&negatives);
    let sparse = Vec::<Vec<i64>>::try_from(&scored(8).4.items).unwrap();
    let (expected, expected_gradients) = by_autograd(|logits, targets| {
        let targets = Vec::<i64>::try_from(targets).unwrap();
        let losses = targets.iter().zip(&sparse).enumerate().map(|(row, (&target, sparse))| {
            let logits = logits.get(row as i64);
            let near = MICRO_BATCHES.iter().map(|of| in_batch && *of == MICRO_BATCHES[row]);
            let near: Vec<i64> =
                targets.iter().zip(near).filter_map(|(&item, is)| is.then_some(item)).collect();
            let expected = |item: i64| {
                let share = item as f64 / occurrences.iter().sum::<i64>() as f64;
                expected_count(item) + near.len() as f64 * share
            };
            let others = sampled.iter().chain(&near);
            let others = others.filter(|item| **item != target && !sparse.contains(item));
            let others: Vec<_> = others.map(|&item| (logits.get(item), expected(item))).collect();
            let sparse = sparse.iter().filter(|item| **item > 0 && **item != target);
            let sparse: Vec<_> = sparse.map(|&item| logits.get(item)).collect();
            of_target(&logits.get(target), &others, &sparse)
        });
        Tensor::stack(&losses.collect::<Vec<_>>(), 0).sum(Kind::Float)
    });
    assert!((loss - expected).abs() < 1e-4, "{loss} {expected}");
    for (number, (gradient, expected)) in gradients.iter().zip(&expected_gradients).enumerate() {
        assert!(distance(gradient, expected) < 1e-5, "{number}");
    }
}

/// The logits of the target and all negatives, sampled ones with logQ correction.
fn all_logits(target: &Tensor, sampled: &[(Tensor, f64)], sparse: &[Tensor]) -> Tensor {
    let corrected = sampled.iter().map(|(logit, expected)| logit - expected.ln());
    let exact = [target].into_iter().chain(sparse).map(Tensor::shallow_clone);
    stack(exact.chain(corrected))
}

fn stack(terms: impl Iterator<Item = Tensor>) -> Tensor {
    Tensor::stack(&terms.collect::<Vec<_>>(), 0)
}

#[test]
fn items_with_sparse_scores_are_negatives_besides_the_sampled_ones() {
    let softmax = |uniform_share, label_smoothing, in_batch| LossConfig::Sampled {
        n_negatives: 12,
        power: 0.5,
        uniform_share,
        label_smoothing,
        in_batch,
    };
    for (uniform, in_batch) in [(0.0, false), (0.25, false), (0.25, true)] {
        let of_target: LossOfTarget = |target, sampled, sparse| {
            all_logits(target, sampled, sparse).logsumexp([0i64].as_slice(), false) - target
        };
        let softmax = softmax(uniform, 0.0, in_batch);
        assert_negatives_are_sampled_and_sparse(softmax, uniform, in_batch, of_target);
    }
    let smoothed: LossOfTarget = |target, sampled, sparse| {
        let all = all_logits(target, sampled, sparse);
        all.logsumexp([0i64].as_slice(), false) - target * 0.8 - all.mean(Kind::Float) * 0.2
    };
    assert_negatives_are_sampled_and_sparse(softmax(0.0, 0.2, false), 0.0, false, smoothed);
    let of_target: LossOfTarget = |target, sampled, sparse| {
        let sampled = sampled.iter().map(|(logit, _)| logit.shallow_clone());
        let negatives = stack(sampled.chain(sparse.iter().map(Tensor::shallow_clone)));
        let s = negatives.softmax(0, Kind::Float);
        let above = (&s * (target - &negatives).sigmoid()).sum(Kind::Float);
        (s * negatives.square()).sum(Kind::Float) * 0.3 - above.log()
    };
    for in_batch in [false, true] {
        let bpr_max = LossConfig::BprMax {
            n_negatives: 12,
            power: 0.5,
            uniform_share: 0.0,
            score_penalty: 0.3,
            in_batch,
        };
        assert_negatives_are_sampled_and_sparse(bpr_max, 0.0, in_batch, of_target);
    }
}

/// A GRU with evidence from the sessions of a shop.
fn network(shop: &OneDay) -> Network<'static> {
    let evidence = EvidenceConfig { hidden_width: 8, candidates: candidates_config() };
    let config = GruConfig {
        hidden_width: 12,
        head: HeadConfig { evidence: Some(evidence), ..HeadConfig::default() },
        ..GruConfig::default()
    };
    shop.gru(&config)
}

#[test]
fn candidates_of_padding_add_nothing() {
    let shop = OneDay::new(&session_data::sessions(60, N_ITEMS, 5));
    let sessions = shop.sessions();
    let batch = batch(&sessions, 0..20, shop.features());
    let logits = Logits { kind: Kind::Float, most: 1 << 20 };
    for label_smoothing in [0.0, 0.1] {
        let sampled = LossConfig::Sampled {
            n_negatives: 12,
            power: 0.5,
            uniform_share: 0.0,
            label_smoothing,
            in_batch: true,
        };
        for loss in [LossConfig::Softmax { label_smoothing }, sampled] {
            let mut network = network(&shop);
            tch::no_grad(|| {
                let mut values = network.parameters().values();
                values += with_seed(5, || values.randn_like() * 0.1);
            });
            let occurrences = vec![2; N_ITEMS as usize];
            let sampler = NegativeSampler::new(loss, &occurrences, logits, Device::Cpu);
            let negatives = sampler.negatives(&uniform_numbers(sampler.n_sampled(), 7));
            let preparer = network.preparer();
            let sizes = preparer.sizes(&preparer.bounds(&batch), true);
            let [packed, padded] = [None, Some(&sizes)].map(|sizes| {
                network.gradients_mut().zero();
                let (prepared, hooks) = (preparer.prepare(&batch, sizes), &mut NoHooks);
                let sum =
                    network.backward(&prepared, &negatives, hooks, &mut PhaseTimer::off()).unwrap();
                (sum.loss.double_value(&[]), network.gradients().all().copy())
            });
            assert!((packed.0 - padded.0).abs() < 1e-6 * packed.0, "{loss:?}");
            let scale = packed.1.abs().max().double_value(&[]);
            let difference = (packed.1 - padded.1).abs().max().double_value(&[]);
            assert!(difference < 1e-6 * scale, "{difference} {scale} {loss:?}");
        }
    }
}

#[test]
fn the_scorer_of_candidates_learns_along_its_gradient() {
    let shop = OneDay::new(&session_data::sessions(60, N_ITEMS, 5));
    let mut network = network(&shop);
    let sessions = shop.sessions();
    let batch = batch(&sessions, 0..20, shop.features());
    let logits = Logits { kind: Kind::Float, most: 1 << 20 };
    let softmax = Negatives::Full { label_smoothing: 0.1, logits };
    let loss = |network: &mut Network, values: &Tensor| {
        tch::no_grad(|| network.parameters().values().copy_(values));
        network.gradients_mut().zero();
        let prepared = network.preparer().prepare(&batch, None);
        let sum =
            network.backward(&prepared, &softmax, &mut NoHooks, &mut PhaseTimer::off()).unwrap();
        sum.loss.double_value(&[])
    };
    // The last layers are 0 at first, and then nothing reaches those before.
    let values = network.parameters().values();
    let noise = tch::no_grad(|| with_seed(5, || values.randn_like() * 0.1));
    let start = network.parameters().values() + noise;
    loss(&mut network, &start);
    let gradient = network.gradients().all().copy();
    let named = network.parameters().named(&gradient);
    for (name, of_name) in named.iter().filter(|(name, _)| name.starts_with("head.evidence")) {
        let norm = of_name.norm().double_value(&[]);
        assert!(norm > 1e-2, "{name}: {norm}");
        let mask = gradient.zeros_like();
        let (_, part) =
            network.parameters().named(&mask).into_iter().find(|(other, _)| other == name).unwrap();
        part.shallow_clone().copy_(of_name);
        let step = mask * (0.02 / norm);
        let change = loss(&mut network, &(&start + &step)) - loss(&mut network, &(&start - &step));
        let expected = 2.0 * 0.02 * norm;
        assert!((change - expected).abs() < 0.03 * expected, "{name}: {change} {expected}");
    }
}

#[test]
fn padded_sessions_are_scored_as_packed_ones() {
    let sessions = session_data::sessions(60, N_ITEMS, 5);
    let shop = OneDay::new(&sessions);
    let network = network(&shop);
    tch::no_grad(|| {
        let values = network.parameters().values();
        values.shallow_clone().copy_(&(&values + values.randn_like() * 0.1));
    });
    let batch = batch(&shop.sessions(), 0..20, shop.features());
    let packed = network.scores(&network.encode(&batch).unwrap(), 0..N_ITEMS);
    let lengths: Vec<i64> = batch.lengths.iter().map(|&length| length as i64).collect();
    let padded = batch.columns.iter().map(|column| {
        let sessions: Vec<Tensor> = column.split_with_sizes(&lengths[..], 0);
        let padded =
            sessions.iter().map(|session| session.constant_pad_nd([0, 20 - session.size()[0]]));
        Tensor::stack(&padded.collect::<Vec<_>>(), 0)
    });
    let padded: Vec<Tensor> = padded.collect();
    let padded = network.next_scores(&padded, &Tensor::from_slice(&lengths), 20);
    assert!(distance(&padded, &packed) < 1e-5);
}

#[test]
fn reminders_follow_from_the_first_training_day() {
    let resolved = |sessions: &[Vec<i64>]| {
        let shop = OneDay::new(sessions);
        let mut evaluate = EvaluateConfig { reminders: Reminders::Auto, ..Default::default() };
        evaluate.resolve_reminders(shop.path(), &data_config()).unwrap();
        evaluate.reminders
    };
    let without = vec![vec![2, 3, 2], vec![1, 1, 4]];
    assert_eq!(resolved(&without), Reminders::Earlier);
    assert_eq!(resolved(&[without, vec![vec![5, 6, 6]]].concat()), Reminders::All);
}

#[test]
fn a_star_selects_all_features_of_the_schema() {
    let dir = tempfile::tempdir().unwrap();
    session_data::write_schema(dir.path(), N_ITEMS);
    session_data::write_sessions(&dir.path().join("1/train.parquet"), &[vec![2, 3]], |_| 0.0);
    let config = DataConfig { features: vec!["*".to_owned()], ..data_config() };
    let days = Days::open(dir.path(), &config).unwrap();
    let names: Vec<_> = days.features().columns().iter().map(|column| &column.name[..]).collect();
    assert_eq!(names, [session_data::ITEM, COLOUR, PRICE]);
}
