//! Training runs, without a launcher and under `mpirun`.

use std::fs;

use bireme::config::Config;
use serde_json::Value;

use crate::support::compare::{assert_identical, assert_same_steps, assert_similar};
use crate::support::configs::{ALL_FEATURES, CONFIG, REPRODUCIBLE, SHARDED, XLNET, config_with};
use crate::support::files::names;
use crate::support::session_data;
use crate::support::session_shop::{SessionShop, timeless};

#[test]
fn losses_and_figures_are_the_same_on_one_two_and_three_ranks() {
    let shop = SessionShop::new(300);
    // Three ranks divide six streams evenly, the last step of an epoch is short, and dropout is
    // drawn as well.
    for dropout in ["model.dropout=0", "model.dropout=0.3"] {
        let set = ["--set", dropout, "--set", "train.epochs_per_day=3"];
        shop.train(&format!("1 {dropout}"), &set).success();
        for n_ranks in [1, 2, 3, 4] {
            let run = format!("{n_ranks} mpi {dropout}");
            let Some(finished) = shop.train_on(n_ranks, &run, &set) else { return };
            finished.success();
            assert_same_steps(&shop, &format!("1 {dropout}"), &run);
        }
    }
    let steps = shop.records("1 model.dropout=0", "step");
    assert_eq!(steps.len(), 2 * 3 * 300usize.div_ceil(48));
    let (first, last) = (&steps[0]["loss"], &steps[steps.len() - 1]["loss"]);
    assert!(last.as_f64().unwrap() < first.as_f64().unwrap() - 0.5, "{first} to {last}");
    assert_ne!(steps[3]["loss"], shop.records("1 model.dropout=0.3", "step")[3]["loss"]);
}

#[test]
fn gradients_reduced_in_bf16_learn_nearly_the_same() {
    let shop = SessionShop::new(300);
    shop.train("f32", &[]).success();
    let bf16 = ["--set", "run.reduction=bf16"];
    // Alone nothing travels, and nothing is rounded.
    shop.train("alone", &bf16).success();
    assert_same_steps(&shop, "f32", "alone");
    let Some(finished) = shop.train_on(2, "bf16", &bf16) else { return };
    finished.success();
    assert_similar(&shop, "f32", "bf16");
}

#[test]
fn bf16_scores_learn_nearly_the_same_replicated_and_sharded() {
    let shop = SessionShop::new(300);
    let bf16 = ["--set", "run.precision=bf16"];
    shop.train("f32", &[]).success();
    shop.train("bf16", &bf16).success();
    assert_similar(&shop, "f32", "bf16");
    let Some(finished) = shop.train_on(3, "sharded", &[bf16, SHARDED].concat()) else { return };
    finished.success();
    assert_similar(&shop, "f32", "sharded");
    // What is rounded where does not depend on the ranks.
    let reproducible = [&bf16[..], &SHARDED, &["--set", "run.reduction=reproducible"]].concat();
    shop.train("exact", &reproducible).success();
    shop.train_on(3, "exact on 3", &reproducible).expect("there were three ranks before").success();
    assert_same_steps(&shop, "exact", "exact on 3");
}

#[test]
fn a_window_of_days_is_trained_on_as_one_and_the_same_on_three_ranks() {
    let shop = SessionShop::new(100);
    let more = ["--set", "data.window_days=2", "--set", "model.dropout=0.2"];
    shop.train("alone", &more).success();
    let trained: Vec<_> = shop
        .records("alone", "day")
        .iter()
        .map(|day| day["n_sessions"].as_i64().unwrap())
        .collect();
    // Two epochs of day 1, then of days 1 and 2.
    assert_eq!(trained, [200, 400]);
    let Some(finished) = shop.train_on(3, "three", &more) else { return };
    finished.success();
    assert_same_steps(&shop, "alone", "three");
}

#[test]
fn masks_negatives_and_swaps_are_the_same_on_one_and_three_ranks() {
    let shop = SessionShop::new(300);
    fs::write(shop.config(), config_with(XLNET)).unwrap();
    let more = [
        &ALL_FEATURES[..],
        &["--set", r#"train.loss={kind = "sampled", n_negatives = 20}"#],
        &["--set", r#"train.tables={kind = "adagrad", learning_rate = 0.05}"#],
        &["--set", "model.input.swap_noise=0.1", "--set", "train.epochs_per_day=1"],
    ];
    shop.train("alone", &more.concat()).success();
    let Some(finished) = shop.train_on(3, "three", &more.concat()) else { return };
    finished.success();
    assert_same_steps(&shop, "alone", "three");
}

#[test]
fn reproducible_weights_are_the_same_to_the_last_bit_on_any_number_of_ranks() {
    let shop = SessionShop::new(200);
    let with_features = [&REPRODUCIBLE[..], &ALL_FEATURES].concat();
    let gru = CONFIG.to_owned();
    let models = [("gru", gru, &REPRODUCIBLE[..]), ("xlnet", config_with(XLNET), &with_features)];
    for (model, config, set) in models {
        fs::write(shop.config(), config).unwrap();
        let alone = format!("{model} alone");
        shop.train(&alone, set).success();
        for n_ranks in 2..=4 {
            let run = format!("{model} {n_ranks}");
            let Some(finished) = shop.train_on(n_ranks, &run, set) else { return };
            finished.success();
            assert_identical(&shop, &run, &alone);
        }
    }
}

#[test]
fn a_run_directory_suffices_to_read_and_repeat_the_run() {
    let shop = SessionShop::new(100);
    let more = ["--set", "checkpoint.every_steps=2", "--set", "checkpoint.keep_last=100"];
    shop.train("run", &more).success();
    let run = shop.run_dir("run");

    let resolved = Config::load(&run.join("config.toml"), &[]).unwrap();
    assert_eq!(
        resolved,
        Config::load(
            &shop.config(),
            &more[1..].iter().step_by(2).map(|s| (*s).to_owned()).collect::<Vec<_>>()
        )
        .unwrap()
    );
    let facts: Value =
        serde_json::from_str(&fs::read_to_string(run.join("run.json")).unwrap()).unwrap();
    assert_eq!((facts["world_size"].as_u64(), facts["device"].as_str()), (Some(1), Some("cpu")));

    let results = fs::read_to_string(run.join("results.txt")).unwrap();
    let last = shop.evaluations("run").pop().unwrap();
    assert!(results.starts_with("GRU accuracy results:\nnext-item/ndcg_at_10:"), "{results}");
    for line in results.lines().skip(1) {
        let (key, value) = line.split_once(':').unwrap();
        let key = key.strip_prefix("next-item/").unwrap();
        assert_eq!(value.parse::<f64>().unwrap(), last[key].as_f64().unwrap(), "{key}");
    }

    // 3 steps an epoch, 6 a day: a checkpoint after steps 2, 4 and 6 of each of the two days.
    let names = names(&run.join("checkpoints"));
    let steps: Vec<_> = names.iter().map(|name| &name[name.len() - 2..]).collect();
    assert_eq!(steps, ["02", "04", "06", "08", "10", "12"]);
    let newest = run.join("checkpoints").join(&names[5]);
    let tensors = ["weights.safetensors", "optimizer.safetensors", "occurrences.safetensors"];
    for file in tensors.iter().chain(&["state.json", "manifest.json"]) {
        assert!(newest.join(file).exists(), "{file}");
    }
    let state: Value =
        serde_json::from_str(&fs::read_to_string(newest.join("state.json")).unwrap()).unwrap();
    assert_eq!(
        (state["optimizer_steps"].as_i64(), state["position"]["day"].as_i64()),
        (Some(12), Some(2))
    );

    // The newest checkpoint gives the very figures of the run; an incomplete one is passed over.
    let evaluate = |more: &[&str]| {
        let finished = shop.evaluate("run", more).success();
        timeless(serde_json::from_str(&finished.stdout).unwrap())
    };
    assert_eq!(evaluate(&[]), last);
    fs::create_dir_all(run.join("checkpoints/day-9999-step-99999999")).unwrap();
    assert_eq!(evaluate(&["--day", "3"]), last);
    let on_test = evaluate(&["--day", "2", "--split", "test"]);
    assert_eq!((on_test["eval_day"].as_i64(), on_test["split"].as_str()), (Some(2), Some("test")));

    // Two epochs of 100 sessions a day.
    for (day, record) in shop.records("run", "day").iter().enumerate() {
        assert_eq!(record["day"].as_i64(), Some(day as i64 + 1));
        assert_eq!(record["n_sessions"].as_i64(), Some(200));
        let [seconds, rate] =
            ["seconds", "sessions_per_s"].map(|key| record[key].as_f64().unwrap());
        assert!((seconds * rate - 200.0).abs() < 1e-6, "{record}");
    }

    // The same run again is the same to the last bit.
    shop.train("again", &more).success();
    let weights = |run: &str| {
        let path =
            shop.run_dir(run).join("checkpoints").join(&names[5]).join("weights.safetensors");
        fs::read(path).unwrap()
    };
    assert_eq!(weights("run"), weights("again"));
}

#[test]
fn days_that_do_not_fill_a_batch_still_train_on_three_ranks() {
    let shop = SessionShop::new(3);
    let Some(finished) = shop.train_on(3, "run", &[]) else { return };
    finished.success();
    shop.train("alone", &[]).success();
    assert_same_steps(&shop, "alone", "run");
}

#[test]
fn a_day_of_fewer_sessions_than_ranks_and_one_of_none_train_as_on_one_rank() {
    for n_sessions in [2, 0] {
        let shop = SessionShop::new(100);
        let sessions = session_data::sessions(n_sessions, 40, 9);
        session_data::write_sessions(&shop.data().join("2/train.parquet"), &sessions, |item| {
            item as f32
        });
        shop.train("alone", &REPRODUCIBLE).success();
        let Some(finished) = shop.train_on(4, "four", &REPRODUCIBLE) else { return };
        finished.success();
        assert_eq!(
            shop.records("alone", "day")[1]["n_sessions"].as_u64(),
            Some(2 * n_sessions as u64)
        );
        assert_identical(&shop, "four", "alone");
    }
}

#[test]
fn a_bad_row_of_a_later_day_is_named_before_the_first_step() {
    let shop = SessionShop::new(200);
    let mut sessions = session_data::sessions(200, 40, 3);
    sessions[150][0] = 77;
    session_data::write_sessions(&shop.data().join("2/train.parquet"), &sessions, |_| 0.0);
    let Some(finished) = shop.train_on(2, "run", &[]) else { return };
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    let message =
        finished.stderr.lines().find(|line| line.contains("train.parquet` row 150")).unwrap();
    assert!(
        message.contains("rank ") && message.contains("has the id 77, outside 1..=39"),
        "{message}"
    );
    assert!(!shop.run_dir("run").exists(), "nothing was begun");
}
