//! Tables of items that ranks share out: another way to the same model.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tch::Tensor;

use crate::fixtures::distance;
use crate::mpirun::mpirun;
use crate::resume::{EXACT, assert_came_to_the_same, checkpoints};
use crate::train::{ALL_FEATURES, CONFIG, PROGRAM, Shop, XLNET, config_with};

pub const SHARDED: [&str; 2] = ["--set", "parallel.item_table=sharded"];

/// Losses, norms and figures of two runs are the same to so small a part.
#[track_caller]
pub fn assert_close(shop: &Shop, run: &str, other: &str, bound: f64) {
    let numbers = |run: &str| {
        let of = |kind: &str, key: &str| -> Vec<f64> {
            shop.records(run, kind).iter().map(|record| record[key].as_f64().unwrap()).collect()
        };
        [of("step", "loss"), of("eval", "loss")].concat()
    };
    let (ours, theirs) = (numbers(run), numbers(other));
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!((ours / theirs - 1.0).abs() < bound, "{run}: {ours}, {other}: {theirs}");
    }
    let sessions = |run: &str| -> Vec<Value> {
        shop.records(run, "eval").iter().map(|record| record["n_sessions"].clone()).collect()
    };
    assert_eq!(sessions(run), sessions(other));
}

/// The tensors of a run's last checkpoint.
fn tensors(shop: &Shop, run: &str) -> Vec<(String, Tensor)> {
    let newest = checkpoints(shop, run).pop().unwrap();
    let mut tensors = Tensor::read_safetensors(newest.join("weights.safetensors")).unwrap();
    tensors.extend(Tensor::read_safetensors(newest.join("optimizer.safetensors")).unwrap());
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    tensors
}

#[track_caller]
fn assert_close_tensors(shop: &Shop, run: &str, other: &str) {
    let (ours, theirs) = (tensors(shop, run), tensors(shop, other));
    assert_eq!(ours.len(), theirs.len());
    for ((name, ours), (other, theirs)) in ours.iter().zip(&theirs) {
        assert_eq!(name, other);
        let largest = theirs.abs().max().double_value(&[]).max(1e-3);
        assert!(distance(ours, theirs) < 1e-3 * largest, "{run}: {name} is {} off", distance(ours, theirs));
    }
}

/// Losses, optimizers, objectives and bodies, each by its name, with its configuration and what is set on top.
pub fn ways_to_learn() -> [(&'static str, String, Vec<&'static str>); 7] {
    let gru = |more: &str| CONFIG.replace("[train]", &format!("[model.objective]\n{more}\n[train]"));
    let causal = "kind = \"causal\"";
    let sampled = "train.loss={ kind = \"sampled\", n_negatives = 12 }";
    let gbce = "train.loss={ kind = \"gbce\", n_negatives = 12 }";
    let smoothed = "train.loss={ kind = \"softmax\", label_smoothing = 0.1 }";
    [
        ("softmax", gru(causal), vec![]),
        ("smoothed", gru(causal), vec!["--set", smoothed, "--set", "model.head.tied=false"]),
        ("sampled", gru(causal), vec!["--set", sampled, "--set", "model.dropout=0.2"]),
        ("gbce", gru(causal), vec!["--set", gbce]),
        ("adagrad", gru(causal), vec!["--set", "train.tables={ kind = \"adagrad\", learning_rate = 0.1 }"]),
        ("replaced", gru("kind = \"replaced\"\nprobability = 0.3\nweight = 1.0"), vec![]),
        (
            "xlnet",
            config_with(XLNET),
            // Of the seeds tried one with which rounding grows little: replicated tables differ as much.
            [&ALL_FEATURES[..], &["--set", "model.dropout=0.2", "--set", "run.seed=43"]].concat(),
        ),
    ]
}

#[test]
fn shared_out_tables_come_to_the_same_losses_figures_and_checkpoints() {
    let shop = Shop::new(150);
    for (name, config, set) in ways_to_learn() {
        fs::write(shop.config(), config).unwrap();
        let whole = format!("{name} whole");
        shop.train(&whole, &set).success();
        for n_ranks in [2, 3] {
            let run = format!("{name} on {n_ranks}");
            let Some(finished) = shop.train_on(n_ranks, &run, &[&set[..], &SHARDED].concat()) else { return };
            finished.success();
            assert_close(&shop, &run, &whole, 1e-5);
            assert_close_tensors(&shop, &run, &whole);
        }
    }
}

#[test]
fn a_run_goes_on_whether_its_tables_are_shared_out_or_not() {
    let shop = Shop::new(150);
    shop.train("unbroken", &[]).success();
    // Killed where every other step was saved, and each time gone on with in another way.
    let every = ["--set", "checkpoint.every_steps=2"];
    let kills: [(usize, &str, &[&str]); 4] =
        [(3, "kill@1:3", &SHARDED), (2, "kill@0:7", &[]), (2, "kill@1:11", &SHARDED), (1, "", &[])];
    for (n_ranks, fault, parallel) in kills {
        let set = [&every[..], parallel].concat();
        let faults: &[(&str, &str)] = if fault.is_empty() { &[] } else { &[("BIREME_FAULT", fault)] };
        let Some(finished) = shop.train_with(n_ranks, "run", &set, faults) else { return };
        assert_eq!(finished.code, Some(if fault.is_empty() { 0 } else { 137 }), "{finished:#?}");
    }
    assert_close(&shop, "run", "unbroken", 1e-5);
    assert_close_tensors(&shop, "run", "unbroken");
}

#[test]
fn more_ranks_than_shares_are_refused() {
    let shop = Shop::new(100);
    let Some(refused) = shop.train_on(4, "run", &SHARDED) else { return };
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    let expected = "the largest number of shards, 3, of an item table of 40 rows";
    assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    // So is the evaluation of a run that fewer made.
    shop.train("run", &SHARDED).success();
    let (run, data) = (shop.run_dir("run"), shop.data());
    let evaluate = ["evaluate", "--run-dir", run.to_str().unwrap(), "--data", data.to_str().unwrap()];
    let limit = Duration::from_secs(60);
    let refused = mpirun(4, Path::new(PROGRAM), &evaluate, &[], limit).unwrap();
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    mpirun(3, Path::new(PROGRAM), &evaluate, &[], limit).unwrap().success();
}

#[test]
fn reproducible_weights_are_the_same_to_the_last_bit_on_any_number_of_ranks() {
    let shop = Shop::new(150);
    // Four micro-batches, which three ranks cannot share evenly.
    let exact = [&SHARDED[..], &EXACT[..4], &["--set", "train.micro_batch=12"]].concat();
    let with_features = [&exact[..], &ALL_FEATURES].concat();
    let smoothed = ["--set", "train.loss={ kind = \"softmax\", label_smoothing = 0.1 }"];
    let sampled = ["--set", "train.loss={ kind = \"sampled\", n_negatives = 12 }"];
    let replaced = CONFIG.replace(
        "[train]",
        "[model.objective]\nkind = \"replaced\"\nprobability = 0.3\nweight = 1.0\n[train]",
    );
    let cases = [
        ("gru", CONFIG.to_owned(), [&exact[..], &smoothed].concat()),
        ("sampled", CONFIG.to_owned(), [&exact[..], &sampled].concat()),
        ("replaced", replaced, exact.clone()),
        ("xlnet", config_with(XLNET), with_features),
    ];
    for (name, config, set) in cases {
        fs::write(shop.config(), config).unwrap();
        let alone = format!("{name} alone");
        shop.train(&alone, &set).success();
        for n_ranks in [1, 2, 3] {
            let run = format!("{name} on {n_ranks}");
            let Some(finished) = shop.train_on(n_ranks, &run, &set) else { return };
            finished.success();
            assert_came_to_the_same(&shop, &run, &alone);
        }
        // They are also those of tables that are not shared out, but for rounding.
        let whole = format!("{name} whole");
        shop.train(&whole, &[&set[..], &["--set", "parallel.item_table=replicated"]].concat()).success();
        assert_close(&shop, &alone, &whole, 1e-5);
    }
}
