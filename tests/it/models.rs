//! Models see the events they may see, do not depend on packing, and learn with every objective and
//! loss.

use std::fs;
use std::process::Command;
use std::sync::Arc;

use bireme::collective::phase_timer::PhaseTimer;
use bireme::config::{Aggregation, Config, Continuous, SessionOrder};
use bireme::data::plan::StepShape;
use bireme::data::{Batch, DayPlan, Days, Features, Loader, Segment, Split, Window, with_seed};
use bireme::model::head::{
    ItemSampler, Logits, NegativeSampler, Negatives, SampledLoss, ScoringTable, Targets, Workspace,
    cross_entropy, uniform_numbers,
};
use bireme::model::objective::{AttentionMask, Plan};
use bireme::model::{
    self, Encoded, GruConfig, InputConfig, ItemTable, LossConfig, Network, Neural, NoHooks,
    Objective, Recommender, XlnetConfig,
};
use bireme::optim::{Optimizer, OptimizerConfig, TableOptimizer};
use tch::{Device, Kind, Tensor};

use crate::support::configs::{ALL_FEATURES, XLNET, config_with};
use crate::support::files::{files_below, root};
use crate::support::process::{LIMIT, PROGRAM, run_within};
use crate::support::session_data::{self, COLOUR, ITEM, PRICE};
use crate::support::session_shop::SessionShop;
use crate::support::tensors::{distance, golden};

const N_ITEMS: i64 = 40;

fn all_features() -> Features {
    session_data::features(&[
        (ITEM.to_owned(), Some(N_ITEMS)),
        (COLOUR.to_owned(), Some(8)),
        (PRICE.to_owned(), None),
    ])
}

/// Sessions with a colour and a price for each item.
fn batch(sessions: &[Vec<i64>]) -> Batch {
    let items = sessions.concat();
    let colours: Vec<i64> = items.iter().map(|&item| session_data::colour(item)).collect();
    let prices: Vec<f32> = items.iter().map(|&item| item as f32 / 40.0).collect();
    Batch {
        columns: vec![
            Tensor::from_slice(&items),
            Tensor::from_slice(&colours),
            Tensor::from_slice(&prices),
        ],
        lengths: sessions.iter().map(Vec::len).collect(),
        session_seeds: sessions.iter().map(|session| session.iter().sum::<i64>() as u64).collect(),
        days: vec![0; sessions.len()],
        step_seed: 3,
        segments: vec![Segment { seed: 5, n_sessions: sessions.len() }],
    }
}

fn input() -> InputConfig {
    InputConfig { item_width: 8, feature_width: 4, init_std: 0.5, ..InputConfig::default() }
}

fn gru(objective: Objective, input: InputConfig) -> GruConfig {
    GruConfig { hidden_width: 12, objective, input, ..GruConfig::default() }
}

fn xlnet(objective: Objective, input: InputConfig) -> XlnetConfig {
    XlnetConfig {
        width: 12,
        n_heads: 2,
        init_std: 0.3,
        dropout: 0.0,
        objective,
        input,
        ..XlnetConfig::default()
    }
}

fn network(config: &Neural<'_>) -> Network<'static> {
    Network::new(config, &all_features(), 20, 7, Device::Cpu).unwrap()
}

fn objectives() -> [Objective; 4] {
    [
        Objective::causal(),
        Objective::Masked { probability: 0.3 },
        Objective::Permutation { probability: 0.3, max_span: 3 },
        Objective::Replaced { probability: 0.3, weight: 1.0 },
    ]
}

const fn f32_logits(most: i64) -> Logits {
    Logits { kind: Kind::Float, most }
}

const SOFTMAX: Negatives = Negatives::Full { label_smoothing: 0.0, logits: f32_logits(1 << 20) };

fn loss_and_gradients(network: &mut Network, batch: &Batch) -> (f64, Tensor) {
    network.gradients_mut().zero();
    let prepared = network.preparer().prepare(batch, None);
    let sum = network.backward(&prepared, &SOFTMAX, &mut NoHooks, &mut PhaseTimer::off()).unwrap();
    (sum.loss.double_value(&[]), network.gradients().all().copy())
}

#[test]
fn packing_sessions_of_different_lengths_does_not_change_results() {
    let sessions =
        [vec![5, 9, 3], vec![2, 7, 11, 30, 21, 4, 8, 8, 2], vec![6, 6], vec![39, 2, 17, 5]];
    for objective in objectives() {
        let (gru, xlnet) = (gru(objective.clone(), input()), xlnet(objective.clone(), input()));
        for config in &[Neural::Xlnet(&xlnet), Neural::Gru(&gru)] {
            let mut network = network(config);
            let (loss, gradients) = loss_and_gradients(&mut network, &batch(&sessions));
            let together = network.encode(&batch(&sessions)).unwrap().vectors;
            let (mut loss_alone, mut gradients_alone) = (0.0, gradients.zeros_like());
            for (row, session) in sessions.iter().enumerate() {
                let alone = batch(std::slice::from_ref(session));
                let (loss, gradients) = loss_and_gradients(&mut network, &alone);
                loss_alone += loss;
                gradients_alone += gradients;
                let encoded = network.encode(&alone).unwrap().vectors;
                assert!(
                    distance(&encoded, &together.narrow(0, row as i64, 1)) < 1e-5,
                    "{config:?}"
                );
            }
            assert!((loss - loss_alone).abs() < 1e-4 * loss, "{loss} {loss_alone} {config:?}");
            let scale = gradients.abs().max().double_value(&[]);
            assert!(distance(&gradients, &gradients_alone) < 1e-5 * scale, "{config:?}");
        }
    }
}

#[test]
fn a_step_filled_up_with_padding_has_the_loss_and_the_gradients_of_its_sessions() {
    let sessions =
        [vec![5, 9, 3], vec![2, 7, 11, 30, 21, 4, 8, 8, 2], vec![6, 6], vec![39, 2, 17, 5]];
    let longer: Vec<Vec<i64>> = (0..9).map(|first| (2 + first..14 + first).collect()).collect();
    let (batch, longer) = (batch(&sessions), batch(&longer));
    let input = InputConfig { swap_noise: 0.3, dropout: 0.2, ..input() };
    let losses = [
        LossConfig::Softmax { label_smoothing: 0.0 },
        LossConfig::Softmax { label_smoothing: 0.1 },
        sampled(12, 0.5),
        LossConfig::BprMax {
            n_negatives: 12,
            power: 0.5,
            uniform_share: 0.0,
            score_penalty: 0.3,
            in_batch: true,
        },
        LossConfig::Gbce { n_negatives: 12, calibration: 0.75 },
    ];
    for objective in &objectives()[..3] {
        let gru = GruConfig { dropout: 0.3, ..gru(objective.clone(), input.clone()) };
        let xlnet = XlnetConfig { dropout: 0.3, ..xlnet(objective.clone(), input.clone()) };
        for (config, loss) in [Neural::Xlnet(&xlnet), Neural::Gru(&gru)]
            .iter()
            .flat_map(|config| losses.iter().map(move |loss| (config, loss)))
        {
            let mut network = network(config);
            let logits = f32_logits(1 << 20);
            let sampler = NegativeSampler::new(*loss, &[3; N_ITEMS as usize], logits, Device::Cpu);
            let negatives = sampler.negatives(&uniform_numbers(sampler.n_sampled(), 7));
            let preparer = network.preparer();
            let bounds = preparer.bounds(&batch).max(&preparer.bounds(&longer));
            let sizes = preparer.sizes(&bounds, false);
            let [(packed, gradients), (padded, padded_gradients)] =
                [None, Some(&sizes)].map(|sizes| {
                    network.gradients_mut().zero();
                    let prepared = preparer.prepare(&batch, sizes);
                    let hooks = &mut NoHooks;
                    let sum = network
                        .backward(&prepared, &negatives, hooks, &mut PhaseTimer::off())
                        .unwrap();
                    (sum.loss.double_value(&[]), network.gradients().all().copy())
                });
            let what = format!("{objective:?} {loss:?} {config:?}");
            assert!((packed - padded).abs() < 1e-6 * packed.abs(), "{packed} {padded} {what}");
            let scale = gradients.abs().max().double_value(&[]);
            let difference = distance(&gradients, &padded_gradients) / scale;
            assert!(difference < 2e-6, "{difference} {what}");
        }
    }
}

#[test]
fn the_last_layer_is_the_same_at_some_positions_as_at_all() {
    let sessions = [vec![5, 9, 3, 7], vec![2, 7, 11, 30, 21, 4]];
    for visible in [AttentionMask::Full, AttentionMask::Causal] {
        let config = xlnet(Objective::causal(), input());
        let network = network(&Neural::Xlnet(&config));
        let everywhere = Plan::all(&[4, 6], visible);
        let some = Plan {
            outputs: vec![1, 3, 4, 8],
            outputs_per_session: vec![2, 2],
            ..everywhere.clone()
        };
        let all = network.read(&batch(&sessions), everywhere).unwrap();
        let rows = all.index_select(0, &Tensor::from_slice(&some.outputs));
        assert!(distance(&network.read(&batch(&sessions), some).unwrap(), &rows) < 1e-5);
    }
}

/// For each target, whether its state depends on the event at `place`.
fn sees(network: &Network, plan: &Plan, session: &[i64], place: usize) -> Vec<bool> {
    let mut other = session.to_vec();
    other[place] = if session[place] == 2 { 3 } else { 2 };
    let [before, after] = [session.to_vec(), other]
        .map(|session| network.read(&batch(&[session]), plan.clone()).unwrap());
    let difference = (before - after).abs().amax([1i64].as_slice(), false);
    Vec::<f64>::try_from(difference.to_kind(Kind::Double))
        .unwrap()
        .iter()
        .map(|d| *d > 1e-6)
        .collect()
}

#[test]
fn predictions_depend_on_visible_events_only() {
    let session = [5, 9, 3, 7, 21, 30];
    // Causal: the state that predicts event i + 1 sees events 0 to i.
    let (gru, xlnet_causal) =
        (gru(Objective::causal(), input()), xlnet(Objective::causal(), input()));
    for config in [Neural::Gru(&gru), Neural::Xlnet(&xlnet_causal)] {
        let network = network(&config);
        let plan = Plan::causal(&[6], &[(0..6).collect()]);
        for place in 0..5 {
            let expected: Vec<bool> = (0..5).map(|i| i >= place).collect();
            assert_eq!(sees(&network, &plan, &session, place), expected, "{config:?}");
        }
    }
    // Masked: those that are not hidden, on both sides.
    let config = xlnet(Objective::Masked { probability: 0.15 }, input());
    let masked = network(&Neural::Xlnet(&config));
    let plan = Plan::masked(&[vec![false, true, false, true, false, false]]);
    for place in 0..6 {
        let expected = ![1, 3].contains(&place);
        assert_eq!(sees(&masked, &plan, &session, place), [expected; 2]);
    }
    // Permutation: those outside the order, and those before it in the order, never itself.
    let config = xlnet(Objective::Permutation { probability: 0.2, max_span: 5 }, input());
    let permuted = network(&Neural::Xlnet(&config));
    let order = [-1, 1, -1, 2, 0, -1];
    let plan = Plan::permuted(&[order.to_vec()]);
    assert_eq!(plan.targets, [1, 3, 4]);
    for place in 0..6 {
        let expected = [1, 3, 4].map(|target| order[place] < order[target]);
        assert_eq!(sees(&permuted, &plan, &session, place), expected, "event {place}");
    }
    // At the end, every objective sees the whole session.
    for objective in objectives() {
        let config = xlnet(objective.clone(), input());
        let network = network(&Neural::Xlnet(&config));
        let plan = objective.next(&[6], true);
        for place in 0..6 {
            assert_eq!(sees(&network, &plan, &session, place), [true], "{objective:?}");
        }
    }
}

/// How a plan cuts an epoch into batches, and how many ranks share them.
struct Layout {
    n_streams: usize,
    micro_batch: usize,
    world_size: usize,
}

/// The events of a session that an objective masks in an epoch.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Masked {
    epoch: usize,
    session: Vec<i64>,
    events: Vec<i64>,
}

/// What all ranks mask in two epochs, sorted.
fn masked(days: &Days, seed: u64, layout: &Layout) -> Vec<Masked> {
    let window = Window::new(vec![Arc::new(days.file(1, Split::Train).unwrap())]);
    let shape = StepShape { n_streams: layout.n_streams, micro_batch: layout.micro_batch };
    let steps_per_epoch = shape.steps(window.n_sessions());
    let plan = DayPlan {
        window,
        day: 1,
        n_epochs: 2,
        shape,
        seed,
        order: SessionOrder::Shuffled,
        max_steps: None,
        one_batch_each: false,
        reads_ahead: layout.world_size > 1,
    };
    let mut masked = Vec::new();
    for rank in 0..layout.world_size {
        let loader = Loader::start(&plan, days.features(), (rank, layout.world_size), 0);
        for (step, passes) in loader.enumerate() {
            for batch in passes.unwrap() {
                masked.extend(masked_in_batch(&batch, step / steps_per_epoch));
            }
        }
    }
    masked.sort();
    masked
}

fn masked_in_batch(batch: &Batch, epoch: usize) -> Vec<Masked> {
    let plan = Objective::Masked { probability: 0.15 }.training(batch, true);
    let (mut first, mut targets) = (0, plan.targets.as_slice());
    let mut masked = Vec::new();
    for (session, n_targets) in batch.sessions().into_iter().zip(plan.outputs_per_session) {
        let (of_session, rest) = targets.split_at(n_targets);
        let events = of_session.iter().map(|event| event - first).collect();
        first += session.len() as i64;
        targets = rest;
        masked.push(Masked { epoch, session: session.clone(), events });
    }
    masked
}

#[test]
fn masks_of_a_session_do_not_depend_on_ranks_or_batches() {
    let dir = tempfile::tempdir().unwrap();
    session_data::write_schema(dir.path(), N_ITEMS);
    // Without duplicates, so that an item list identifies a session.
    let mut sessions = session_data::sessions(400, N_ITEMS, 9);
    sessions.sort();
    sessions.dedup();
    session_data::write_sessions(&dir.path().join("1/train.parquet"), &sessions, |_| 0.0);
    let config = bireme::data::DataConfig {
        first_day: Some(1),
        last_day: Some(2),
        window_days: 1,
        max_length: 20,
        features: Vec::new(),
    };
    let days = Days::open(dir.path(), &config).unwrap();
    let one_rank = Layout { n_streams: 8, micro_batch: 4, world_size: 1 };
    let alone = masked(&days, 42, &one_rank);
    assert_eq!(alone.len(), 2 * sessions.len());
    assert_eq!(masked(&days, 42, &Layout { world_size: 3, ..one_rank }), alone);
    assert_eq!(masked(&days, 42, &Layout { n_streams: 2, micro_batch: 32, world_size: 2 }), alone);
    assert_ne!(masked(&days, 43, &one_rank), alone);
    let (first, second) = alone.split_at(sessions.len());
    let differing = first.iter().zip(second).filter(|(a, b)| a.events != b.events).count();
    assert!(
        differing > sessions.len() / 3,
        "{differing} of {} differ between epochs",
        sessions.len()
    );
}

#[test]
fn every_objective_and_every_input_learns_to_follow_a_chain() {
    let shop_sessions = session_data::sessions(64, N_ITEMS, 11);
    let shop = batch(&shop_sessions);
    let inputs = [
        InputConfig { projection_width: Some(12), ..input() },
        InputConfig { continuous: Continuous::Projected { width: 6 }, layer_norm: true, ..input() },
        InputConfig {
            continuous: Continuous::SoftOneHot { n_vectors: 5, width: 4 },
            swap_noise: 0.05,
            ..input()
        },
        InputConfig {
            aggregation: Aggregation::Sum,
            feature_width: 8,
            continuous: Continuous::SoftOneHot { n_vectors: 5, width: 8 },
            layer_norm: true,
            ..input()
        },
    ];
    for (objective, input) in objectives().into_iter().zip(inputs) {
        let mut gru = gru(objective.clone(), input.clone());
        gru.head.tied = false;
        let xlnet = xlnet(objective.clone(), input);
        for config in &[Neural::Xlnet(&xlnet), Neural::Gru(&gru)] {
            let mut network = network(config);
            let loss = |network: &mut Network| loss_and_gradients(network, &shop).0;
            let before = loss(&mut network);
            let values = network.parameters().values();
            let adamw = TableOptimizer::Adamw;
            let mut optimizer = Optimizer::new(
                &values,
                network.tables(),
                OptimizerConfig { tables: adamw, learning_rate: 0.02, weight_decay: 0.0 },
            );
            for _ in 0..40 {
                let (_, gradients) = loss_and_gradients(&mut network, &shop);
                let rates = optimizer.rates(1.0);
                optimizer.step(&values, &gradients, &Tensor::from(1f32), rates);
            }
            let after = loss(&mut network);
            assert!(after < 0.85 * before, "{before} to {after}: {config:?}");
            // No parameter is left out, but row by row in tables.
            let (_, gradients) = loss_and_gradients(&mut network, &shop);
            for (name, gradient) in network.parameters().named(&gradients) {
                assert!(
                    gradient.abs().max().double_value(&[]) > 0.0,
                    "{name} has no gradient: {config:?}"
                );
            }
        }
    }
}

#[test]
fn features_of_other_widths_cannot_be_summed() {
    let input = InputConfig { aggregation: Aggregation::Sum, ..input() };
    let config = gru(Objective::causal(), input);
    let refused =
        Network::new(&Neural::Gru(&config), &all_features(), 20, 7, Device::Cpu).err().unwrap();
    assert_eq!(
        refused,
        "`model.input.aggregation` cannot be `sum`: feature `colour-list_seq` has the width 4, the \
         item 8"
    );
}

/// Encoded sessions, their targets, and the item table that scores them.
struct Head {
    states: Tensor,
    targets: Tensor,
    table: Tensor,
    bias: Tensor,
}

impl Head {
    fn random(n: i64, width: i64, n_items: i64) -> Self {
        let on = (Kind::Float, Device::Cpu);
        let targets = Tensor::randint_low(2, n_items, [n], (Kind::Int64, Device::Cpu));
        Self {
            states: Tensor::randn([n, width], on),
            targets,
            table: Tensor::randn([n_items, width], on),
            bias: Tensor::randn([n_items], on),
        }
    }

    /// 30 targets in a catalogue of [`N_ITEMS`].
    fn small() -> Self {
        with_seed(4, || Self::random(30, 8, N_ITEMS))
    }

    fn cross_entropy(&self, negatives: &Negatives, uniform: Option<&Tensor>) -> CrossEntropy {
        let (n, n_items) = (self.targets.size()[0], self.bias.size()[0]);
        let mut scored = ScoringTable {
            weights: self.table.shallow_clone(),
            bias: self.bias.shallow_clone(),
            items: None,
            weight_gradient: self.table.zeros_like(),
            bias_gradient: self.bias.zeros_like(),
            row_lists: None,
            item_table: &ItemTable::replicated(n_items),
            counts: &[n],
            group_added: &mut || (),
        };
        let targets = Targets {
            items: self.targets.shallow_clone(),
            micro_batches: Tensor::zeros([n], (Kind::Int64, Device::Cpu)),
            weights: None,
            uniform: uniform.map(Tensor::shallow_clone),
        };
        let workspace = &mut Workspace::default();
        let states = Encoded { vectors: self.states.shallow_clone(), sparse: None };
        let done = cross_entropy(&states, &targets, &mut scored, negatives, workspace).unwrap();
        let ScoringTable { weight_gradient, bias_gradient, .. } = scored;
        CrossEntropy {
            loss: done.loss.double_value(&[]),
            gradients: [done.state_gradient, weight_gradient, bias_gradient],
            drawn: done.drawn,
        }
    }

    /// States, table and bias, such that PyTorch differentiates a loss by them.
    fn leaves(&self) -> [Tensor; 3] {
        [&self.states, &self.table, &self.bias].map(|tensor| tensor.copy().set_requires_grad(true))
    }
}

/// A summed loss, and its gradients by states, table and bias.
struct CrossEntropy {
    loss: f64,
    gradients: [Tensor; 3],
    drawn: Option<Tensor>,
}

impl CrossEntropy {
    /// Asserts the loss and the gradients that PyTorch computes.
    #[track_caller]
    fn assert_as_pytorch(&self, loss: &Tensor, leaves: &[Tensor; 3], bound: f64) {
        let expected = Tensor::run_backward(&[loss], leaves, true, false);
        assert!((self.loss - loss.double_value(&[])).abs() < bound, "{} {loss:?}", self.loss);
        for (gradient, expected) in self.gradients.iter().zip(&expected) {
            assert!(distance(gradient, expected) < 1e-4);
        }
    }
}

fn full_softmax(label_smoothing: f64, logits: Logits) -> Negatives {
    Negatives::Full { label_smoothing, logits }
}

#[test]
fn losses_do_not_depend_on_the_number_of_threads() {
    // Two chunks or more for each of three threads, the last ones shorter; kept, kept in parts, and
    // computed twice.
    let (n_items, n) = (26_000, 40);
    let head = with_seed(11, || Head::random(n, 8, n_items));
    let uniform = Tensor::arange(n, (Kind::Float, Device::Cpu)) / n as f64;
    let on = |n_threads: i32, max_logits: i64| {
        tch::set_num_threads(n_threads);
        head.cross_entropy(&full_softmax(0.0, f32_logits(max_logits)), Some(&uniform))
    };
    let one = on(1, 1 << 30);
    for max_logits in [1 << 30, 36 * n_items, 9 * n_items] {
        let three = on(3, max_logits);
        assert!((one.loss - three.loss).abs() < 1e-6 * one.loss, "{} {}", one.loss, three.loss);
        for (a, b) in one.gradients.iter().zip(&three.gradients) {
            assert!(distance(a, b) < 1e-5, "{max_logits}: {}", distance(a, b));
        }
        // A number that falls between two items may fall to either.
        let [one, three] = [&one, &three].map(|result| result.drawn.as_ref().unwrap());
        let n_other = one.ne_tensor(three).sum(Kind::Int64).int64_value(&[]);
        assert!(n_other <= 1, "{n_other} of {n}");
    }
}

#[test]
fn bf16_scores_are_close_and_summed_in_f32() {
    let head = Head::small();
    let full = head.cross_entropy(&SOFTMAX, None);
    for most in [1, 4 * N_ITEMS, 1 << 20] {
        let logits = Logits { kind: Kind::BFloat16, most };
        let rounded = head.cross_entropy(&full_softmax(0.0, logits), None);
        assert_ne!(rounded.loss, full.loss);
        assert!((rounded.loss / full.loss - 1.0).abs() < 3e-3, "{} {}", rounded.loss, full.loss);
        for (exact, rounded) in full.gradients.iter().zip(&rounded.gradients) {
            assert_eq!(rounded.kind(), Kind::Float);
            let largest = exact.abs().max().double_value(&[]);
            assert!(
                distance(exact, rounded) < 0.02 * largest,
                "{} of {largest}",
                distance(exact, rounded)
            );
        }
    }
}

#[test]
fn label_smoothing_is_that_of_pytorch() {
    let head = Head::small();
    let leaves = head.leaves();
    let logits = leaves[2].addmm(&leaves[0], &leaves[1].tr());
    let weight = None::<&Tensor>;
    let loss = logits.cross_entropy_loss(&head.targets, weight, tch::Reduction::Sum, -100, 0.1);
    for max_logits in [1, 4 * N_ITEMS, 1 << 20] {
        let smoothed = head.cross_entropy(&full_softmax(0.1, f32_logits(max_logits)), None);
        smoothed.assert_as_pytorch(&loss, &leaves, 1e-4);
    }
}

#[test]
fn sampled_softmax_approximates_the_full_one() {
    let head = Head::small();
    let full = head.cross_entropy(&SOFTMAX, None);
    // Very unevenly drawn: item 2 a thousand times as often as most.
    let mut occurrences = vec![0; N_ITEMS as usize];
    occurrences[2] = 999;
    occurrences[3] = 99;
    let sampler = ItemSampler::new(sampled(400_000, 1.0), &occurrences, Device::Cpu);
    let drawn =
        head.cross_entropy(&sampler.negatives(&uniform_numbers(sampler.n_sampled(), 1)), None);
    // Padding and unknown are no negatives here, so the full sum is over two items more.
    assert!((drawn.loss / full.loss - 1.0).abs() < 0.05, "{} {}", drawn.loss, full.loss);
    for (sampled, full) in drawn.gradients.iter().zip(&full.gradients) {
        let recommendable = |x: &Tensor| {
            if x.size()[0] == N_ITEMS { x.narrow(0, 2, N_ITEMS - 2) } else { x.copy() }
        };
        let (sampled, full) = (recommendable(sampled), recommendable(full));
        let cosine = (&sampled * &full).sum(Kind::Float) / (sampled.norm() * full.norm());
        assert!(cosine.double_value(&[]) > 0.99, "{cosine:?}");
    }
    let drawn = |seed| match sampler.negatives(&uniform_numbers(sampler.n_sampled(), seed)) {
        Negatives::Sampled { items, .. } => Vec::<i64>::try_from(items.narrow(0, 0, 100)).unwrap(),
        Negatives::Full { .. } => unreachable!(),
    };
    assert_eq!(drawn(5), drawn(5));
    assert_ne!(drawn(5), drawn(6));
    assert!(drawn(5).iter().all(|&item| item >= 2));
}

fn sampled(n_negatives: i64, power: f64) -> LossConfig {
    LossConfig::Sampled {
        n_negatives,
        power,
        uniform_share: 0.0,
        label_smoothing: 0.0,
        in_batch: false,
    }
}

/// Recall@5 of the last events of new sessions, after 400 steps with a loss.
fn recall_at_5_after_training(loss: LossConfig) -> f64 {
    let trained = batch(&session_data::sessions(400, N_ITEMS, 3));
    let (known, targets) = batch(&session_data::sessions(300, N_ITEMS, 4)).split_last();
    // Binary cross entropy pushes most scores far below zero, where the gradient of a ReLU is zero.
    let mut config = gru(Objective::causal(), input());
    config.head.relu = false;
    let mut network = network(&Neural::Gru(&config));
    let values = network.parameters().values();
    let mut optimizer = Optimizer::new(
        &values,
        network.tables(),
        OptimizerConfig { tables: TableOptimizer::Adamw, learning_rate: 0.02, weight_decay: 0.0 },
    );
    let sampler =
        NegativeSampler::new(loss, &[0; N_ITEMS as usize], f32_logits(1 << 20), Device::Cpu);
    for step in 0..400 {
        network.gradients_mut().zero();
        let negatives = sampler.negatives(&uniform_numbers(sampler.n_sampled(), step));
        let prepared = network.preparer().prepare(&trained, None);
        let sum =
            network.backward(&prepared, &negatives, &mut NoHooks, &mut PhaseTimer::off()).unwrap();
        let scale = sum.n_targets.reciprocal().squeeze();
        let rates = optimizer.rates(1.0);
        optimizer.step(&values, &network.gradients().all(), &scale, rates);
    }
    let scores = network.scores(&network.encode(&known).unwrap(), 0..N_ITEMS);
    let (_, top) = scores.topk(5, 1, true, true);
    let hits = top.eq_tensor(&targets.unsqueeze(1)).any_dim(1, false);
    hits.to_kind(Kind::Double).mean(Kind::Double).double_value(&[])
}

#[test]
fn sampled_losses_learn_what_the_full_softmax_learns() {
    let full = recall_at_5_after_training(LossConfig::Softmax { label_smoothing: 0.0 });
    // An item is followed by the next one eight times in ten.
    assert!(full > 0.7, "{full}");
    for loss in [
        sampled(20, 0.0),
        LossConfig::BprMax {
            n_negatives: 20,
            power: 0.0,
            uniform_share: 0.0,
            score_penalty: 0.01,
            in_batch: false,
        },
        LossConfig::Gbce { n_negatives: 20, calibration: 0.75 },
    ] {
        let drawn = recall_at_5_after_training(loss);
        assert!(drawn > full - 0.05, "{loss:?}: {drawn}, the full softmax {full}");
    }
}

#[test]
fn gbce_is_the_binary_cross_entropy_of_target_and_negatives() {
    let items = Tensor::from_slice(&[2i64, 9, 9, 17, 30]);
    let head = Head::small();
    let (leaves, targets) = (head.leaves(), &head.targets);
    // What an item comes to that is the target as often as any other.
    let average = (0.3f64 / 5.0).ln();
    let logits = leaves[2].addmm(&leaves[0], &leaves[1].tr()) + average;
    let itself = targets.unsqueeze(1).eq_tensor(&items.unsqueeze(0)).to_kind(Kind::Float);
    let negatives = logits.index_select(1, &items).sigmoid();
    let of_negatives =
        ((Tensor::from(1f32) - negatives).log() * (Tensor::from(1f32) - itself)).sum(Kind::Float);
    let of_targets = logits.gather(1, &targets.unsqueeze(1), false).log_sigmoid().sum(Kind::Float);
    let loss = -(of_targets * 0.3 + of_negatives);
    let sampled = SampledLoss::Binary { target_weight: 0.3 };
    let found =
        head.cross_entropy(&Negatives::Sampled { items, loss: sampled, in_batch: None }, None);
    found.assert_as_pytorch(&loss, &leaves, 1e-3);
}

#[test]
fn a_calibrated_target_weighs_as_much_as_with_all_negatives() {
    let target_weight = |n_negatives, calibration| {
        let loss = LossConfig::Gbce { n_negatives, calibration };
        let sampler = ItemSampler::new(loss, &[0; 103], Device::Cpu);
        match sampler.negatives(&uniform_numbers(sampler.n_sampled(), 1)) {
            Negatives::Sampled { loss: SampledLoss::Binary { target_weight }, .. } => target_weight,
            _ => unreachable!(),
        }
    };
    // Of 100 other items: Petrov and Macdonald's β for t = 0, 1 and 0.75 at α = 0.1, and where all
    // are drawn.
    for ((n, t), expected) in [
        ((10, 0.0), 1.0),
        ((10, 1.0), 0.1),
        ((10, 0.75), 0.325),
        ((100, 0.3), 1.0),
        ((900, 0.3), 1.0),
    ] {
        assert!((target_weight(n, t) - expected).abs() < 1e-12);
    }
}

#[test]
fn an_added_column_needs_no_code() {
    let shop = SessionShop::new(100);
    fs::write(shop.config(), config_with(XLNET)).unwrap();
    shop.train("run", &ALL_FEATURES).success();
    let results = fs::read_to_string(shop.run_dir("run").join("results.txt")).unwrap();
    assert!(
        results.starts_with("XLNet-MLM with side information accuracy results:\n"),
        "{results}"
    );
    let finished =
        shop.train("sum", &[&ALL_FEATURES[..], &["--set", "model.input.aggregation=sum"]].concat());
    assert!(finished.stderr.contains("`model.input.aggregation` cannot be `sum`"), "{finished:#?}");
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(!shop.run_dir("sum").exists());
}

#[test]
fn configurations_that_no_model_can_have_are_refused() {
    let shop = SessionShop::new(20);
    for (model, assignment, message) in [
        (XLNET, "model.n_heads=3", "`width` 16 is not an even number divisible by `n_heads` 3"),
        (
            XLNET,
            "model.objective.probability=0",
            "`objective.probability` 0.0 is not within 0 < p < 1",
        ),
        (
            XLNET,
            "model.objective.kind=autoregressive",
            "`model.objective.kind` cannot be `autoregressive`; it is one of `causal`, `masked`",
        ),
        (XLNET, "model.head.temperature=0", "`head.temperature` cannot be 0.0"),
        (XLNET, "model.input.swap_noise=1", "`input.swap_noise` 1.0 is not within"),
        (
            XLNET,
            "model.head.evidence.candidates={ n_recent = 1000, n_neighbours = 100 }",
            "`head.evidence.candidates.n_recent` 1000 times `n_neighbours` 100 is 100000",
        ),
        (
            XLNET,
            "model.head.evidence.candidates.attributes=[\"taste\"]",
            "`candidates.attributes` has `taste`: it is not in `data.features`",
        ),
        (XLNET, "model.input.dropout=1", "`input.dropout` 1.0 is not within"),
        (XLNET, "model.inptu.item_width=3", "unknown key `model.inptu`"),
        (
            "kind = \"gru\"",
            "model.objective={kind = \"causal\", drop = 1.5}",
            "`objective.drop` 1.5 is not within",
        ),
        (
            XLNET,
            "train.loss={kind = \"sampled\", n_negatives = 0}",
            "`loss.n_negatives` cannot be 0",
        ),
        (
            XLNET,
            "train.tables={kind = \"adagrad\", learning_rate = nan}",
            "`tables.learning_rate` cannot be NaN",
        ),
    ] {
        fs::write(shop.config(), config_with(model)).unwrap();
        let mut set = vec!["--set", assignment];
        if assignment.contains("objective.probability") {
            set.extend(["--set", "model.objective.kind=masked"]);
        }
        shop.train("run", &set).refused(message);
    }
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn configurations_in_the_repository_are_complete() {
    let paths = files_below(&root().join("configs"));
    assert!(paths.len() >= 6, "{paths:?}");
    for path in paths {
        let config =
            Config::load(&path, &[]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let resolved: toml::Table = config.to_toml().parse().unwrap();
        assert!(resolved.contains_key("model"));
        if let model::ModelConfig::Xlnet(xlnet) = config.model {
            assert!(!xlnet.attend_to_padding);
        }
    }
}

#[test]
fn weights_of_the_original_are_imported() {
    let golden = golden("xlnet_tiny");
    let shop = SessionShop::new(20);
    session_data::write_days(&shop.data(), 3, 20, 30);
    let tiny = "kind = \"xlnet\"\nwidth = 8\nn_heads = 2\n\
                input = { item_width = 6, projection_width = 8 }\n";
    fs::write(shop.config(), config_with(tiny)).unwrap();
    let weights: Vec<(&str, &Tensor)> = golden
        .iter()
        .filter_map(|(name, weight)| Some((name.strip_prefix("w.")?, weight)))
        .collect();
    let file = shop.dir.path().join("original.safetensors");
    Tensor::write_safetensors(&weights, &file).unwrap();
    let import = |run: &str, more: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.arg("import-weights").arg("--weights").arg(&file).args(["--day", "2"]);
        command.arg("--config").arg(shop.config()).arg("--data").arg(shop.data());
        command.arg("--run-dir").arg(shop.run_dir(run)).args(more);
        run_within(&mut command, LIMIT)
    };
    import("run", &[]).success();
    let finished = shop.evaluate("run", &[]).success();
    assert!(finished.stdout.contains("\"train_day\":2"), "{finished:#?}");
    let saved = shop.run_dir("run").join("checkpoints/day-0002-step-00000000/weights.safetensors");
    let saved = Tensor::read_safetensors(saved).unwrap();
    let (_, mask) = saved.iter().find(|(name, _)| name == "input.mask").unwrap();
    assert_eq!(distance(mask, &golden["w.heads.0.body.0._masking.masked_item_embedding"]), 0.0);

    // So do those of a model that was trained in parallel and compiled.
    let wrapped: Vec<(String, &Tensor)> = weights
        .iter()
        .map(|(name, weight)| (format!("_orig_mod.module.{name}"), *weight))
        .collect();
    Tensor::write_safetensors(&wrapped, &file).unwrap();
    import("wrapped", &[]).success();
    let [plain, unwrapped] = ["run", "wrapped"].map(|run| {
        fs::read(shop.run_dir(run).join("checkpoints/day-0002-step-00000000/weights.safetensors"))
            .unwrap()
    });
    assert!(plain == unwrapped);
    let doubles: Vec<(&str, Tensor)> =
        weights.iter().map(|(name, weight)| (*name, weight.to_kind(Kind::Double))).collect();
    Tensor::write_safetensors(&doubles, &file).unwrap();
    import("doubles", &[]).success();
    let all_but_one: Vec<(&str, &Tensor)> =
        weights.iter().filter(|(name, _)| !name.ends_with("output_layer_bias")).copied().collect();
    Tensor::write_safetensors(&all_but_one, &file).unwrap();
    import("missing", &[]).refused("parameter `item_table.bias` is missing");
    Tensor::write_safetensors(&weights, &file).unwrap();

    import("other", &["--set", "model.width=16"]).refused("the model's is [16");
    fs::write(&file, "no tensors").unwrap();
    import("unreadable", &[]).refused("cannot read");
    assert!(!shop.run_dir("other").exists() && !shop.run_dir("unreadable").exists());
}
