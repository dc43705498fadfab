//! Models and metrics reproduce the numbers of the original.

use std::collections::HashMap;

use bireme::collective::phase_timer::PhaseTimer;
use bireme::data::{Batch, Features, Segment};
use bireme::metrics::{Ranking, Tally, rank_targets};
use bireme::model::head::{Logits, Negatives};
use bireme::model::objective::{AttentionMask, Plan};
use bireme::model::parameters::ParameterBuilder;
use bireme::model::{
    GruConfig, InputConfig, ItemTable, Layout, Network, Neural, NoHooks, Parameters, Recommender,
    Xlnet, XlnetConfig, import,
};
use bireme::optim::{Optimizer, OptimizerConfig, Schedule, TableOptimizer, average_and_clip};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::support::session_data::{ITEM, features};
use crate::support::tensors::{distance, golden, golden_path, nothing_hidden};

const MASK: &str = "heads.0.body.0._masking.masked_item_embedding";

const TABLES: &str = "heads.0.body.0.to_merge.categorical_module.embedding_tables.";

type Named = HashMap<String, Tensor>;

/// The columns of a file, the item id first, then by name.
fn columns_of(golden: &Named) -> Vec<(String, Tensor)> {
    let mut columns: Vec<(String, Tensor)> = golden
        .iter()
        .filter_map(|(name, column)| {
            Some((name.strip_prefix("in.")?.to_owned(), column.shallow_clone()))
        })
        .collect();
    columns.sort_by_key(|(name, _)| (name != ITEM, name.clone()));
    columns
}

fn features_of(golden: &Named, n_items: i64) -> Features {
    let columns: Vec<(String, Option<i64>)> = columns_of(golden)
        .into_iter()
        .map(|(name, column)| {
            let table =
                golden.get(&format!("w.{TABLES}{name}.weight")).map(|table| table.size()[0]);
            // Where weights are not stored, further rows have no effect.
            let n_rows = if name == ITEM { Some(n_items) } else { table.or(Some(500)) };
            (name, n_rows.filter(|_| column.kind() == Kind::Int64))
        })
        .collect();
    features(&columns)
}

/// Packs padded columns `[B, L]`, of which the first is the item id.
fn pack(columns: &[Tensor]) -> Batch {
    let lengths = columns[0].ne(0).sum_dim_intlist([1i64].as_slice(), false, Kind::Int64);
    let lengths: Vec<i64> = lengths.try_into().unwrap();
    let there = columns[0].ne(0);
    Batch {
        columns: columns.iter().map(|column| column.masked_select(&there)).collect(),
        session_seeds: vec![0; lengths.len()],
        days: vec![0; lengths.len()],
        step_seed: 0,
        segments: vec![Segment { seed: 0, n_sessions: lengths.len() }],
        lengths: lengths.into_iter().map(|length| length as usize).collect(),
    }
}

fn batch_of(golden: &Named) -> Batch {
    pack(&columns_of(golden).into_iter().map(|(_, column)| column).collect::<Vec<_>>())
}

fn load(network: &Network, weights: Vec<(String, Tensor)>) {
    let wanted = |name: &str| network.parameters().views().iter().any(|view| view.name == name);
    let weights = import::rename(weights, ITEM, wanted).unwrap();
    network.parameters().assign(&network.parameters().values(), &weights, &[]).unwrap();
}

fn stored_weights(golden: &Named) -> Vec<(String, Tensor)> {
    let weight = |(name, weight): (&String, &Tensor)| {
        Some((name.strip_prefix("w.")?.to_owned(), weight.shallow_clone()))
    };
    golden.iter().filter_map(weight).collect()
}

fn gru_tiny(golden: &Named, extra_rows: &[&Tensor]) -> Network<'static> {
    let input = InputConfig { item_width: 6, ..InputConfig::default() };
    let config = GruConfig { hidden_width: 8, input, ..GruConfig::default() };
    let n_items = 30 + extra_rows.len() as i64;
    let features = features(&[(ITEM.to_owned(), Some(n_items))]);
    let network = Network::new(&Neural::Gru(&config), &features, 5, 1, Device::Cpu).unwrap();
    let weights = stored_weights(golden).into_iter().map(|(name, weight)| {
        let rows: Vec<Tensor> = if name.ends_with("embedding_tables.product_id-list_seq.weight") {
            extra_rows.iter().map(|row| row.view([1, -1])).collect()
        } else if name.ends_with("output_layer_bias") {
            vec![Tensor::zeros([extra_rows.len() as i64], (Kind::Float, Device::Cpu))]
        } else {
            Vec::new()
        };
        let parts: Vec<&Tensor> = std::iter::once(&weight).chain(&rows).collect();
        let grown = if rows.is_empty() { weight.shallow_clone() } else { Tensor::cat(&parts, 0) };
        (name, grown)
    });
    load(&network, weights.collect());
    network
}

/// The XLNet of a file: every width as there, padding attended to, which is the original's fault.
fn xlnet(golden: &Named, info: &Value, length: usize) -> Network<'static> {
    let size = |key: &str| info[key].as_i64().unwrap();
    let input = InputConfig {
        item_width: size("emb"),
        feature_width: size("emb"),
        projection_width: Some(size("d_model")),
        ..InputConfig::default()
    };
    let config = XlnetConfig {
        width: size("d_model"),
        n_heads: size("heads"),
        dropout: 0.0,
        attend_to_padding: true,
        input,
        ..XlnetConfig::default()
    };
    let features = features_of(golden, size("vocab"));
    Network::new(&Neural::Xlnet(&config), &features, length, 1, Device::Cpu).unwrap()
}

fn info(name: &str) -> Value {
    let text = std::fs::read_to_string(golden_path(&format!("{name}.json"))).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The plan with the original's mask.
fn masked_as(golden: &Named, batch: &Batch) -> Plan {
    let mask = golden["train.mask_schema"].ne(0);
    let hidden: Vec<Vec<bool>> = (0..batch.n_sessions())
        .map(|row| {
            let of_row: Vec<bool> = mask.get(row as i64).try_into().unwrap();
            of_row[..batch.lengths[row]].to_vec()
        })
        .collect();
    Plan::masked(&hidden)
}

/// Every event of every session, in order.
fn whole(lengths: &[usize]) -> Vec<Vec<usize>> {
    lengths.iter().map(|&length| (0..length).collect()).collect()
}

fn softmax(max_logits: i64) -> Negatives {
    Negatives::Full { label_smoothing: 0.0, logits: Logits { kind: Kind::Float, most: max_logits } }
}

/// Mean loss over the targets, and mean gradients by their original names.
fn learn(
    network: &mut Network,
    batch: &Batch,
    plan: Plan,
    negatives: &Negatives,
) -> (f64, Vec<(String, Tensor)>) {
    let n_targets = plan.targets.len() as f64;
    network.gradients_mut().zero();
    let prepared = network.preparer().prepare_planned(batch, plan);
    let sum = network.backward(&prepared, negatives, &mut NoHooks, &mut PhaseTimer::off()).unwrap();
    assert_eq!(sum.n_targets.double_value(&[0]), n_targets);
    let gradients = network.parameters().named(&(network.gradients().all() / n_targets));
    (sum.loss.double_value(&[]) / n_targets, gradients)
}

/// What the original calls each parameter of ours.
fn originals<'a>(names: impl Iterator<Item = &'a String>) -> HashMap<String, String> {
    let names: Vec<(String, String)> = names.map(|name| (name.clone(), name.clone())).collect();
    import::rename(names, ITEM, |_| true).unwrap().into_iter().collect()
}

#[test]
fn gru_has_the_loss_and_every_gradient_of_the_original() {
    let golden = golden("gru_tiny_batch_first");
    let weights = stored_weights(&golden);
    let originals = originals(weights.iter().map(|(name, _)| name));
    // As many logits at once as there are for one target, for four, and for all.
    for max_logits in [1, 4 * 30, 1000] {
        let mut network = gru_tiny(&golden, &[]);
        let batch = batch_of(&golden);
        let plan = Plan::causal(&batch.lengths, &whole(&batch.lengths));
        let (loss, gradients) = learn(&mut network, &batch, plan, &softmax(max_logits));
        assert!((loss - golden["train.loss"].double_value(&[0])).abs() < 1e-6, "{loss}");
        assert_eq!(gradients.len(), 10);
        for (ours, gradient) in gradients {
            let expected = &golden[&format!("train.grad.{}", originals[&ours])];
            let scale = expected.abs().max().double_value(&[]);
            assert!(distance(&gradient, expected) <= 1e-5 * scale, "{ours}");
        }
        // The one parameter that the original has and we do not: positions without a target read
        // it, to no effect.
        assert_eq!(golden[&format!("train.grad.{MASK}")].abs().max().double_value(&[]), 0.0);
    }
}

#[test]
fn gru_has_the_logits_of_the_original_at_every_target() {
    let golden = golden("gru_tiny_batch_first");
    let network = gru_tiny(&golden, &[]);
    let items = &golden["in.product_id-list_seq"];
    let expected = &golden["train.act.4_logits_at_labels"];
    let mut row = 0;
    for session in 0..4 {
        let session = items.get(session);
        let length = session.ne(0).sum(Kind::Int64).int64_value(&[]);
        for n_known in 1..length {
            let known = pack(&[session.narrow(0, 0, n_known).unsqueeze(0)]);
            let logits = network.scores(&network.encode(&known).unwrap(), 0..30);
            assert!(distance(&logits, &expected.narrow(0, row, 1)) < 1e-5, "target {row}");
            row += 1;
        }
    }
    assert_eq!(row, 11);
}

/// At evaluation the original hides all but the last known item behind its mask vector. That fault
/// is not ours, but its numbers check us all the same: with the mask vector as one more item,
/// hidden events are events of that item.
#[test]
fn gru_has_the_logits_of_the_original_at_evaluation() {
    let golden = golden("gru_tiny_batch_first");
    let network = gru_tiny(&golden, &[&golden[&format!("w.{MASK}")]]);
    let items = &golden["in.product_id-list_seq"];
    for session in 0..4 {
        let visible = items.get(session);
        let n_known = visible.ne(0).sum(Kind::Int64).int64_value(&[]) - 1;
        let hidden = Tensor::full([n_known - 1], 30, (Kind::Int64, Device::Cpu));
        let known = Tensor::cat(&[hidden, visible.narrow(0, n_known - 1, 1)], 0).unsqueeze(0);
        let logits = network.scores(&network.encode(&pack(&[known])).unwrap(), 0..30);
        assert!(
            distance(&logits, &golden["eval.act.4_logits_at_labels"].narrow(0, session, 1)) < 1e-5
        );
    }
}

#[test]
fn xlnet_has_the_states_and_logits_of_the_original() {
    for (name, length, tolerance) in
        [("xlnet_tiny", 5, 1e-5), ("xlnet_tiny_side", 5, 1e-5), ("xlnet_tutorial_size", 20, 1e-4)]
    {
        let (golden, info) = (golden(name), info(name));
        let network = xlnet(&golden, &info, length);
        load(&network, weights_of(&golden, &info, &network));
        let batch = batch_of(&golden);
        let plan = masked_as(&golden, &batch);
        let width = info["d_model"].as_i64().unwrap();
        let at_labels = |phase: &str| {
            let labels =
                golden[&format!("{phase}.labels_2d")].reshape([-1]).nonzero().squeeze_dim(1);
            golden[&format!("{phase}.act.2_body")].reshape([-1, width]).index_select(0, &labels)
        };
        // The last layer at the positions that are predicted alone, then at all of them.
        let states = network.read(&batch, plan.clone()).unwrap();
        assert!(distance(&states, &at_labels("train")) < tolerance, "{name}");
        let padded = plan.padded(length);
        let n = padded.inputs.len() as i64;
        let everywhere = Plan {
            outputs: (0..n).collect(),
            outputs_per_session: padded.lengths.clone(),
            ..padded
        };
        let states = network.read(&batch, everywhere).unwrap();
        assert!(
            distance(&states, &golden["train.act.2_body"].reshape([-1, width])) < tolerance,
            "{name}"
        );
        // At evaluation the original hides the last event, where ours puts the mask behind those
        // known.
        let (known, targets) = batch.split_last();
        assert_eq!(
            Vec::<i64>::try_from(targets).unwrap(),
            Vec::<i64>::try_from(&golden["eval.labels_flat"]).unwrap()
        );
        let logits =
            network.scores(&network.encode(&known).unwrap(), 0..info["vocab"].as_i64().unwrap());
        assert!(
            distance(&logits, &golden["eval.act.4_logits_at_labels"]) < 10.0 * tolerance,
            "{name}"
        );
    }
}

/// Hugging Face's XLNet layers on given vectors.
#[test]
fn xlnet_layers_are_those_of_hugging_face() {
    let golden = golden("xlnet_body_tiny");
    let config = XlnetConfig { width: 8, n_heads: 2, dropout: 0.0, ..XlnetConfig::default() };
    let mut initial = ParameterBuilder::default();
    let xlnet = Xlnet::declare(&config, &mut initial);
    let parameters = Parameters::new(initial, Device::Cpu);
    for view in parameters.views() {
        let original = view.name.replacen("xlnet.", "w.", 1);
        tch::no_grad(|| view.of(&parameters.values()).copy_(&golden[&original]));
    }
    let sessions = pack(&[Tensor::full([3, 5], 2, (Kind::Int64, Device::Cpu))]);
    let plan = Plan::all(&[5, 5, 5], AttentionMask::Full);
    let layout = Layout::new(&plan, sessions.n_events() as i64, None);
    let x = golden["in.inputs_embeds"].reshape([15, 8]);
    let states = tch::no_grad(|| xlnet.states(&parameters, x, None, &layout, None));
    assert!(distance(&states, &golden["out"].reshape([15, 8])) < 1e-5);
}

/// Stored weights, or those that the file's description derives from their place: see the data's
/// README.
fn weights_of(golden: &Named, info: &Value, network: &Network) -> Vec<(String, Tensor)> {
    let Value::Object(seeds) = &info["param_order_and_splitmix_seed"] else {
        return stored_weights(golden);
    };
    let originals = originals(seeds.keys());
    let views = network.parameters().views();
    originals
        .iter()
        .filter_map(|(ours, original)| {
            let shape = &views.iter().find(|view| view.name == *ours)?.shape;
            let k = seeds[original].as_u64().unwrap();
            let values: Vec<f32> = (0..shape.iter().product::<i64>() as u64)
                .map(|i| {
                    let mut z = (k << 32).wrapping_add(i).wrapping_add(0x9E37_79B9_7F4A_7C15);
                    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                    z ^= z >> 31;
                    let unit = (z >> 40) as f32 / 8_388_608.0 - 1.0;
                    if original.ends_with("layer_norm.weight") {
                        1.0 + 0.2 * unit
                    } else {
                        0.12 * unit
                    }
                })
                .collect();
            Some((original.clone(), Tensor::from_slice(&values).view(shape.as_slice())))
        })
        .collect()
}

#[test]
fn xlnet_has_the_loss_and_every_gradient_of_the_original() {
    for (name, n_parameters) in [("xlnet_tiny", 39), ("xlnet_tiny_side", 41)] {
        let (golden, info) = (golden(name), info(name));
        let weights = stored_weights(&golden);
        let originals = originals(weights.iter().map(|(name, _)| name));
        for max_logits in [1, 1000] {
            let mut network = xlnet(&golden, &info, 5);
            load(&network, stored_weights(&golden));
            let batch = batch_of(&golden);
            let plan = masked_as(&golden, &batch);
            let (loss, gradients) = learn(&mut network, &batch, plan, &softmax(max_logits));
            assert!(
                (loss - golden["train.loss"].double_value(&[0])).abs() < 1e-6,
                "{name}: {loss}"
            );
            assert_eq!(gradients.len(), n_parameters);
            for (ours, gradient) in gradients {
                let expected = &golden[&format!("train.grad.{}", originals[&ours])];
                let scale = expected.abs().max().double_value(&[]);
                let off = distance(&gradient, expected);
                assert!(off <= 1e-5 * scale, "{name}, {ours}: off by {off} of {scale}");
            }
        }
    }
}

#[test]
fn models_of_the_tutorials_size_have_the_gradients_of_the_original() {
    let name = "xlnet_tutorial_size";
    let (golden, info) = (golden(name), info(name));
    let mut network = xlnet(&golden, &info, 20);
    load(&network, weights_of(&golden, &info, &network));
    let batch = batch_of(&golden);
    let plan = masked_as(&golden, &batch);
    let (loss, gradients) = learn(&mut network, &batch, plan, &softmax(2000));
    assert!((loss - golden["train.loss"].double_value(&[0])).abs() < 1e-5, "{loss}");
    let seeds = info["param_order_and_splitmix_seed"].as_object().unwrap();
    let originals = originals(seeds.keys());
    for (ours, gradient) in gradients {
        let original = &originals[&ours];
        let expected: Vec<f64> =
            (&golden[&format!("train.gradsum.{original}")]).try_into().unwrap();
        let found = gradient.to_kind(Kind::Double);
        let [norm, sum, most] =
            [found.norm(), found.sum(Kind::Double), found.abs().max()].map(|x| x.double_value(&[]));
        assert!(
            (norm - expected[0]).abs() <= 1e-4 * expected[0],
            "{ours}: norm {norm} {expected:?}"
        );
        // Terms cancel in a sum: what matters is how large they are.
        let size = found.abs().sum(Kind::Double).double_value(&[]);
        assert!((sum - expected[1]).abs() <= 1e-4 * size, "{ours}: sum {sum} {expected:?}");
        assert!(
            (most - expected[2]).abs() <= 1e-4 * expected[2],
            "{ours}: largest {most} {expected:?}"
        );
        let head = &golden[&format!("train.gradhead.{original}")];
        let ours_head = gradient.reshape([-1]).narrow(0, 0, head.size()[0]);
        assert!(distance(&ours_head, head) <= 1e-4 * expected[2], "{ours}: first values");
    }
}

#[test]
fn five_steps_end_in_the_weights_of_the_original() {
    let (golden, info) = (golden("xlnet_tiny"), info("xlnet_tiny"));
    let mut network = xlnet(&golden, &info, 5);
    load(&network, stored_weights(&golden));
    let batch = batch_of(&golden);
    let values = network.parameters().values();
    let mut optimizer = Optimizer::new(
        &values,
        network.tables(),
        OptimizerConfig {
            tables: TableOptimizer::Adamw,
            learning_rate: 6.66e-4,
            weight_decay: 0.0,
        },
    );
    for step in 0..5 {
        let plan = masked_as(&golden, &batch);
        network.gradients_mut().zero();
        let prepared = network.preparer().prepare_planned(&batch, plan);
        let sum = network
            .backward(&prepared, &softmax(1000), &mut NoHooks, &mut PhaseTimer::off())
            .unwrap();
        let n_targets = sum.n_targets.squeeze();
        let gradients = network.gradients().all();
        let (scale, norm) = average_and_clip(&gradients, &Tensor::from(0f32), &n_targets, 1.0);
        let norm = norm.double_value(&[]);
        let rates = optimizer.rates(Schedule::Linear.factor(step, 5));
        optimizer.step(&values, &gradients, &scale, rates);
        let expected = |key: &str| info["adamw"][key][step].as_f64().unwrap();
        let loss = sum.loss.double_value(&[]) / n_targets.double_value(&[]);
        assert!((loss - expected("losses")).abs() < 1e-5, "step {step}: {loss}");
        assert!((norm - expected("grad_norm_before_clip")).abs() < 1e-4, "step {step}: {norm}");
    }
    let finals =
        golden.keys().filter_map(|name| name.strip_prefix("adamw_final.").map(str::to_owned));
    let finals: Vec<String> = finals.collect();
    let originals = originals(finals.iter());
    for (ours, weight) in network.parameters().named(&values) {
        let expected = &golden[&format!("adamw_final.{}", originals[&ours])];
        // AdamW divides a gradient by its own size: where that is near rounding, a thousandth of
        // the way is chance.
        assert!(distance(&weight, expected) < 3e-5, "{ours}: {}", distance(&weight, expected));
    }
}

#[test]
fn metrics_are_those_of_the_original() {
    let golden = golden("metrics");
    let mut tally = Tally::default();
    for batch in ["b1", "b2"] {
        let (scores, labels) =
            (&golden[&format!("scores.{batch}")], &golden[&format!("labels.{batch}")]);
        // The original recommends every class; ours begin at index 2.
        let never =
            Tensor::full([scores.size()[0], 2], f64::from(f32::MAX), (Kind::Float, Device::Cpu));
        let scores = Tensor::cat(&[&never, scores], 1);
        let Ranking { ranks, .. } = rank_targets(
            |items| scores.narrow(1, items.start, items.end - items.start),
            (&(labels + 2), &nothing_hidden(labels.size()[0])),
            &ItemTable::replicated(42),
            9,
            20,
        )
        .unwrap();
        tally.add(&Vec::<i64>::try_from(ranks).unwrap(), None);
    }
    let metrics = tally.metrics(false);
    let close = |ours: f64, theirs: &str, k: i64| {
        assert!((ours - golden[theirs].double_value(&[k])).abs() < 1e-6, "{theirs} {k}: {ours}");
    };
    close(metrics.ndcg_at_10, "NDCGAt.compute", 0);
    close(metrics.ndcg_at_20, "NDCGAt.compute", 1);
    close(metrics.recall_at_10, "RecallAt.compute", 0);
    close(metrics.recall_at_20, "RecallAt.compute", 1);
}
