//! A stopped run resumes to the results of an uninterrupted one.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::compare::assert_identical;
use crate::support::configs::{ALL_FEATURES, CONFIG, REPRODUCIBLE, RESUMABLE, XLNET, config_with};
use crate::support::event_shop::EventShop;
use crate::support::process::{Finished, kill};
use crate::support::session_data;
use crate::support::session_shop::SessionShop;

#[test]
fn a_killed_run_resumes_to_the_same_bits_on_any_number_of_ranks() {
    let shop = SessionShop::of_twenty_steps();
    let with_features = [&RESUMABLE[..], &ALL_FEATURES].concat();
    for (model, config, set) in
        [("gru", CONFIG.to_owned(), &RESUMABLE[..]), ("xlnet", config_with(XLNET), &with_features)]
    {
        fs::write(shop.config(), config).unwrap();
        let unbroken = format!("{model} unbroken");
        shop.train(&unbroken, set).success();
        // In the middle of an epoch, at the end of a day, before the first checkpoint, and not at
        // all.
        let run = format!("{model} killed");
        for (n_ranks, fault) in
            [(2, "kill@1:1"), (3, "kill@0:7"), (1, "kill@0:10"), (4, "kill@2:19")]
        {
            let Some(killed) = shop.train_with_fault(n_ranks, &run, set, fault) else {
                return;
            };
            // By mpirun's own account of a rank that a signal ended.
            assert_eq!(killed.code, Some(137), "{killed:#?}");
            assert!(!shop.run_dir(&run).join("results.txt").exists());
        }
        let last = shop.train_on(2, &run, set).unwrap().success();
        assert!(last.stderr.contains("resuming from"), "{last:#?}");
        assert_identical(&shop, &run, &unbroken);
        let again = shop.train_on(2, &run, set).unwrap().success();
        assert!(again.stderr.contains("holds this run, and it is done"), "{again:#?}");
        assert_identical(&shop, &run, &unbroken);
        let facts = fs::read_to_string(shop.run_dir(&run).join("run.json")).unwrap();
        let facts: Value = serde_json::from_str(&facts).unwrap();
        let ranks = |facts: &Value| facts["world_size"].as_u64().unwrap();
        let earlier: Vec<u64> = facts["earlier"].as_array().unwrap().iter().map(ranks).collect();
        assert_eq!((earlier, ranks(&facts)), (vec![2, 3, 1, 4], 2));
    }
}

#[test]
fn a_run_that_is_asked_to_stop_saves_a_checkpoint_and_resumes() {
    let shop = SessionShop::of_twenty_steps();
    // Long enough to be met by a signal.
    let set = [&REPRODUCIBLE[..], &["--set", "train.epochs_per_day=30"]].concat();
    shop.train("unbroken", &set).success();
    let signalled = |signal: &str| shop.train_and_interfere("run", &set, |pid| kill(signal, pid));
    for signal in ["USR2", "TERM"] {
        let (code, stderr) = signalled(signal);
        assert_eq!(code, Some(3), "{stderr}");
        assert!(stderr.contains("stopped on request after day "), "{stderr}");
    }
    // SIGUSR1 requests a checkpoint, and the run continues.
    let (code, stderr) = signalled("USR1");
    assert_eq!(code, Some(0), "{stderr}");
    let days: Vec<i64> = shop
        .records("run", "checkpoint")
        .iter()
        .map(|record| record["day"].as_i64().unwrap())
        .collect();
    assert!(days.len() >= 3, "{days:?}");
    assert_identical(&shop, "run", "unbroken");
}

#[test]
fn a_damaged_checkpoint_is_skipped_for_an_older_one() {
    let shop = SessionShop::of_twenty_steps();
    let set = [&RESUMABLE[..], &["--set", "checkpoint.keep_last=3"]].concat();
    shop.train("unbroken", &set).success();
    // The next checkpoint waits for the one before, so at the last step all but the last are
    // written.
    let Some(killed) = shop.train_with_fault(1, "run", &set, "kill@0:19") else { return };
    assert_eq!(killed.code, Some(137), "{killed:#?}");
    let [.., older, newest] = &shop.checkpoints("run")[..] else { panic!("two checkpoints") };
    let weights = newest.join("weights.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, &bytes).unwrap();
    let optimizer = older.join("optimizer.safetensors");
    fs::File::options().write(true).open(&optimizer).unwrap().set_len(100).unwrap();
    // What a writer leaves that was stopped halfway.
    let partial = shop.run_dir("run").join("checkpoints/day-0002-step-00000018.partial");
    fs::create_dir(&partial).unwrap();
    let last = shop.train("run", &set).success();
    for message in [
        "the hash of `weights.safetensors` is not the one that was written",
        "`optimizer.safetensors` has 100 bytes",
    ] {
        assert!(last.stderr.contains(message), "{last:#?}");
    }
    assert!(!partial.exists());
    assert_identical(&shop, "run", "unbroken");
}

#[test]
fn a_run_resumes_with_the_same_configuration_and_data_only() {
    let shop = SessionShop::of_twenty_steps();
    let one_day = [&RESUMABLE[..], &["--set", "data.last_day=2"]].concat();
    shop.train("run", &one_day).success();
    let refused = |finished: Finished, message: &str| finished.refused(message);
    let other = [&one_day[..], &["--set", "train.learning_rate=0.02"]].concat();
    refused(shop.train("run", &other), "`train.learning_rate` was 0.01, and is 0.02 now");
    refused(
        shop.train(
            "run",
            &[&RESUMABLE[..], &["--set", "data.last_day=4", "--set", "run.seed=1"]].concat(),
        ),
        "no day 4",
    );
    let none_left = [&RESUMABLE[..], &["--set", "data.first_day=2", "--resume=anyway"]].concat();
    refused(
        shop.train("run", &none_left),
        "it is of day 1, which the configuration does not train on",
    );
    // More days may follow, as when they were not over yet.
    shop.train("run", &RESUMABLE).success();
    shop.train("unbroken", &RESUMABLE).success();
    assert_identical(&shop, "run", "unbroken");

    let sessions = session_data::sessions(200, 40, 77);
    session_data::write_sessions(&shop.data().join("1/train.parquet"), &sessions, |_| 0.0);
    refused(shop.train("run", &RESUMABLE), "the file of day and part `1/train` has changed");
    shop.train("run", &[&RESUMABLE[..], &["--resume=anyway"]].concat()).success();
}

#[test]
fn a_run_without_days_takes_all_days_and_later_ones() {
    let shop = SessionShop::of_twenty_steps();
    let (before, rest) = CONFIG.split_once("[data]").unwrap();
    let (_, rest) = rest.split_once("[model]").unwrap();
    fs::write(shop.config(), format!("{before}[model]{rest}")).unwrap();
    shop.train("run", &RESUMABLE).success();
    let written = fs::read_to_string(shop.run_dir("run").join("config.toml")).unwrap();
    assert!(written.contains("first_day = 1\nlast_day = 3\n"), "{written}");
    let done = shop.train("run", &RESUMABLE).success();
    assert!(done.stderr.contains("and it is done"), "{done:#?}");

    for part in ["train", "valid"] {
        let sessions = session_data::sessions(200, 40, 5);
        session_data::write_sessions(
            &shop.data().join(format!("4/{part}.parquet")),
            &sessions,
            |_| 0.0,
        );
    }
    let on = shop.train("run", &RESUMABLE).success();
    assert!(on.stderr.contains("resuming from"), "{on:#?}");
    let days: Vec<i64> =
        shop.records("run", "day").iter().map(|record| record["day"].as_i64().unwrap()).collect();
    assert_eq!(days, [1, 2, 3]);
    shop.train("unbroken", &RESUMABLE).success();
    assert_identical(&shop, "run", "unbroken");

    // A day before the first would be another run.
    fs::create_dir(shop.data().join("0")).unwrap();
    let other = shop.train("run", &RESUMABLE);
    assert_eq!(other.code, Some(2), "{other:#?}");
    fs::copy(shop.data().join("1/train.parquet"), shop.data().join("0/train.parquet")).unwrap();
    let other = shop.train("run", &RESUMABLE);
    assert_eq!(other.code, Some(2), "{other:#?}");
    assert!(other.stderr.contains("`data.first_day` was 1, and is 0 now"), "{other:#?}");
    shop.train("run", &[&RESUMABLE[..], &["--set", "data.first_day=1"]].concat()).success();
    // So would be a run that ends earlier than it has.
    for day in ["0", "4"] {
        fs::remove_dir_all(shop.data().join(day)).unwrap();
    }
    let other = shop.train("run", &RESUMABLE);
    assert_eq!(other.code, Some(2), "{other:#?}");
    assert!(other.stderr.contains("`data.last_day` was 4, and is 3 now"), "{other:#?}");
}

#[test]
fn the_best_day_and_every_days_last_checkpoint_can_be_kept() {
    let shop = SessionShop::of_twenty_steps();
    let days = ["--set", "checkpoint.keep_days=true", "--set", "checkpoint.keep_last=1"];
    shop.train("days", &[&RESUMABLE[..], &days].concat()).success();
    let names = |run: &str| -> Vec<String> {
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        shop.checkpoints(run).iter().map(name).collect()
    };
    assert_eq!(names("days"), ["day-0001-step-00000010", "day-0002-step-00000020"]);
    let best = ["--set", "checkpoint.keep_best=recall_at_20", "--set", "checkpoint.keep_last=1"];
    shop.train("best", &[&RESUMABLE[..], &best].concat()).success();
    assert_eq!(names("best"), ["day-0001-step-00000010", "day-0002-step-00000020"]);
    let minutes = ["--set", "checkpoint.every_minutes=1e-9", "--set", "checkpoint.keep_last=100"];
    shop.train("minutes", &[&REPRODUCIBLE[..], &minutes].concat()).success();
    assert_eq!(names("minutes").len(), 20);
}

#[test]
fn a_run_resumes_after_later_days_added_items() {
    let shop = EventShop::small();
    let [more, data, run, out] =
        ["more.csv", "data", "run", "repository"].map(|name| shop.path(name));
    // A shop with more items, of whose days the first two are there already.
    let synth = [
        "synth", "--events", "30000", "--items", "900", "--days", "4", "--seed", "9", "--out",
        &more,
    ];
    shop.run(&synth).success();
    let config = shop.path("config.toml");
    let model = "[model]\nkind = \"gru\"\nhidden_width = 16\n[train]\nmax_steps_per_day = 6\n\
                 global_batch = 64\n";
    let tables = "tables = { kind = \"adagrad\", learning_rate = 0.1 }\n";
    let days =
        |last_day: i64| format!("[data]\nfirst_day = 1\nlast_day = {last_day}\n{model}{tables}");
    fs::write(&config, days(2)).unwrap();
    let train = [
        "train",
        "--config",
        &config,
        "--data",
        &data,
        "--run-dir",
        &run,
        "--set",
        "run.device=cpu",
    ];
    shop.run(&train).success();
    let state = |day: i64| -> Value {
        let checkpoints = PathBuf::from(&run).join("checkpoints");
        let newest =
            fs::read_dir(checkpoints).unwrap().map(|entry| entry.unwrap().path()).max().unwrap();
        let state: Value =
            serde_json::from_str(&fs::read_to_string(newest.join("state.json")).unwrap()).unwrap();
        assert_eq!(state["position"]["day"].as_i64(), Some(day));
        state
    };
    let before = state(1)["n_items"].as_i64().unwrap();
    let extended = shop.run(&["preprocess", "--events", &more, "--extend", &data]).success();
    assert!(extended.stdout.contains("of earlier days"), "{extended:#?}");
    fs::write(&config, days(3)).unwrap();
    let on = shop.run(&train).success();
    assert!(on.stderr.contains("resuming from"), "{on:#?}");
    let after = state(2);
    assert!(after["n_items"].as_i64().unwrap() > before + 100, "{before} and {after}");
    // What serving needs of the data has grown too.
    let library = shop.library();
    let export = [
        "export",
        "--run-dir",
        &run,
        "--out",
        &out,
        "--backend-library",
        library.to_str().unwrap(),
    ];
    let exported = shop.run(&export).success();
    assert!(exported.stdout.contains(&format!("{} items", after["n_items"])), "{exported:#?}");
}
