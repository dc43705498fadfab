//! Wrong input is refused with one message and exit code 2, and leaves no files.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use bireme::config::Config;
use bireme::data::{Days, RowCheck, Split};

use crate::support::configs::{CONFIG, XLNET, config_with};
use crate::support::process::{Finished, LIMIT, PROGRAM, run_within};
use crate::support::session_data;
use crate::support::session_shop::SessionShop;

fn refused(finished: &Finished, message: &str) {
    finished.refused(message);
    let errors: Vec<&str> =
        finished.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    let [error] = errors[..] else { panic!("{finished:#?}") };
    assert!(error.chars().count() <= 310 && !error.contains(char::is_control), "{error}");
}

#[test]
fn configurations() {
    let shop = SessionShop::new(20);
    let set = |assignment: &str| shop.train("run", &["--set", assignment]);
    for (assignment, message) in [
        (
            "train.learning_rat=1",
            "unknown key `train.learning_rat` in the configuration: did you mean \
             `train.learning_rate`?",
        ),
        (
            "model.hiden_width=1",
            "unknown key `model.hiden_width` in the configuration: did you mean \
             `model.hidden_width`?",
        ),
        ("trian.epochs=1", "unknown key `trian` in the configuration: did you mean `train`?"),
        ("model.kind=lstm", "`lstm`"),
        (
            "train.global_batch=fast",
            "`train.global_batch` must be a whole number from 0 on, not the string `fast`",
        ),
        ("train.global_batch=50", "`global_batch` 50 is not a whole number of micro-batches of 8"),
        ("train.epochs_per_day=0", "`epochs_per_day` must be at least 1"),
        ("train.learning_rate=nan", "`learning_rate` cannot be NaN"),
        ("model.dropout=1.5", "`dropout` 1.5"),
        ("data.last_day=1", "`last_day` 1 is not after `first_day` 1"),
        ("data.window_days=0", "`window_days` must be at least 1"),
        ("dropout", "`--set dropout` is not of the form `section.key=value`"),
        ("data.features=[\"colour\"]", "feature `colour` of `data.features` is not in the schema"),
        ("data.last_day=9", "no day 4 under"),
    ] {
        refused(&set(assignment), message);
    }
    assert!(!shop.run_dir("run").exists());
    fs::write(shop.config(), "[run\n").unwrap();
    refused(&shop.train("run", &[]), "is not valid TOML");
    let config = shop.config();
    let config = config.to_str().unwrap();
    fs::write(config, "[run]\nseed = 1\nseed = 2\n").unwrap();
    let line = format!("`{config}` is not valid TOML: line 3, column 1: duplicate key");
    refused(&shop.train("run", &[]), &line);
    fs::write(config, b"\x7fELF\xff\x00").unwrap();
    refused(&shop.train("run", &[]), &format!("cannot read the configuration `{config}`"));
    fs::write(config, "").unwrap();
    refused(&shop.train("run", &[]), " is missing");
    fs::remove_file(config).unwrap();
    refused(&shop.train("run", &[]), "cannot read the configuration");
    fs::create_dir(config).unwrap();
    refused(
        &shop.train("run", &[]),
        &format!("cannot read the configuration `{config}`: Is a directory"),
    );
    fs::remove_dir(config).unwrap();
    fs::write(config, CONFIG).unwrap();
    let huge = format!("train.micro_batch={}\u{1b}[31m\nx", "9".repeat(10_000));
    refused(&shop.train("run", &["--set", &huge]), "`train.micro_batch` must be a whole number");
    fs::write(config, "[run]\n\"a\\u001b[31m\" = 1\n").unwrap();
    refused(&shop.train("run", &[]), "unknown key `run.a\\u{1b}[31m`");
}

#[test]
fn a_row_that_one_rank_cannot_read_is_named_before_the_rank() {
    let shop = SessionShop::new(200);
    let mut sessions = session_data::sessions(200, 40, 3);
    sessions[150] = vec![5, 41];
    session_data::write_sessions(&shop.data().join("1/train.parquet"), &sessions, |_| 0.0);
    let Some(failed) = shop.train_on(2, "run", &[]) else { return };
    assert!([Some(1), Some(2)].contains(&failed.code), "{failed:#?}");
    let error = failed.stderr.lines().find(|line| line.starts_with("error: ")).unwrap();
    let row =
        "1/train.parquet` row 150: column `product_id-list_seq` has the id 41, outside 1..=39";
    assert!(error.contains(row), "{failed:#?}");
    for debug in ["(())", "Uint8", "Float", "Some("] {
        assert!(!failed.stderr.contains(debug), "{failed:#?}");
    }
}

#[test]
fn damaged_files_of_a_run() {
    let shop = SessionShop::new(60);
    shop.train("run", &[]).success();
    let run_dir = shop.run_dir("run");
    let checkpoint = shop.newest_checkpoint("run");
    let evaluate = || shop.evaluate("run", &[]);
    let report = || {
        let mut command = Command::new(PROGRAM);
        command.arg("report").arg(&run_dir).arg("--out").arg(shop.dir.path().join("report"));
        run_within(&mut command, LIMIT)
    };
    let damaged = |file: PathBuf, text: &str, command: &dyn Fn() -> Finished, message: &str| {
        let whole = fs::read(&file).unwrap();
        fs::write(&file, text).unwrap();
        let finished = command();
        refused(&finished, message);
        for word in ["struct", "invalid type", "expected u", "enum"] {
            assert!(!finished.stderr.contains(word), "{finished:#?}");
        }
        fs::write(&file, whole).unwrap();
    };
    let config = run_dir.join("config.toml");
    damaged(config.clone(), "train = 3\n", &evaluate, "config.toml`: ");
    damaged(config, "[", &evaluate, "config.toml` is not valid TOML: line 1, column ");
    let metrics = run_dir.join("metrics.jsonl");
    damaged(
        metrics.clone(),
        "{\"kind\":\"other\"}\n{\"kind\"",
        &report,
        "metrics.jsonl`, line 2: ",
    );
    damaged(
        metrics,
        "{\"kind\":\"step\",\"day\":{},\"step\":1,\"loss\":1}",
        &report,
        "metrics.jsonl`, line 1: ",
    );
    damaged(run_dir.join("run.json"), "[1,", &report, "run.json`, line 1: ");
    // The older checkpoint takes its place.
    fs::write(checkpoint.join("manifest.json"), "{\"files\": 3}").unwrap();
    let warned = evaluate().success();
    assert!(
        warned.stderr.contains("`manifest.json`: the number 3 where a table is expected at line 1"),
        "{warned:#?}"
    );
}

#[test]
fn data() {
    let shop = SessionShop::new(20);
    let valid = shop.data().join("3/valid.parquet");
    let whole = fs::read(&valid).unwrap();
    // A footer that is cut off, then one that is not there at all.
    fs::write(&valid, &whole[..whole.len() - 6]).unwrap();
    refused(&shop.train("run", &[]), "3/valid.parquet` is not a readable parquet file");
    fs::remove_file(&valid).unwrap();
    refused(&shop.train("run", &[]), "cannot open");
    fs::write(&valid, &whole).unwrap();
    fs::rename(shop.data().join("schema.pbtxt"), shop.data().join("elsewhere")).unwrap();
    refused(&shop.train("run", &[]), "schema.pbtxt`");
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn rows() {
    let shop = SessionShop::new(20);
    let train = shop.data().join("1/train.parquet");
    let features = ["--set", "data.features=[\"price_log_norm-list_seq\"]"];
    let one_event = vec![vec![5, 6], vec![7]];
    let none = vec![vec![5, 6], vec![], vec![5, 6]];
    let too_large = vec![vec![5, 6], vec![40, 6]];
    let padding = vec![vec![0, 6]];
    for (sessions, message) in [
        (
            one_event,
            "1/train.parquet` row 1: column `product_id-list_seq` has a session of one event",
        ),
        (
            none,
            "1/train.parquet` row 1: column `product_id-list_seq` holds a null or an empty list",
        ),
        (
            too_large,
            "1/train.parquet` row 1: column `product_id-list_seq` has the id 40, outside 1..=39",
        ),
        (
            padding,
            "1/train.parquet` row 0: column `product_id-list_seq` has the id 0, outside 1..=39",
        ),
        (
            vec![vec![5, 6, 7], vec![8, 9]],
            "row 1: column `price_log_norm-list_seq` has the value NaN",
        ),
    ] {
        session_data::write_sessions(
            &train,
            &sessions,
            |item| if item == 9 { f32::NAN } else { 0.0 },
        );
        // All files are checked before the first step, on whichever rank the row falls.
        refused(&shop.train("run", &features), message);
        if let Some(finished) = shop.train_on(2, "run", &features) {
            refused(&finished, message);
        }
    }
    assert!(!shop.run_dir("run").exists());
    // So is the last day, which is only evaluated, and the file that `evaluate` reads.
    session_data::write_days(&shop.data(), 3, 20, 40);
    shop.train("run", &[]).success();
    session_data::write_sessions(
        &shop.data().join("3/valid.parquet"),
        &[vec![5, 6], vec![7]],
        |_| 0.0,
    );
    let one_event =
        "3/valid.parquet` row 1: column `product_id-list_seq` has a session of one event";
    let finished = shop.train("other", &[]);
    refused(&finished, one_event);
    assert!(finished.stderr.contains("hint: `bireme preprocess --min-length 2`"), "{finished:#?}");
    refused(&shop.evaluate("run", &[]), one_event);
}

#[test]
fn rows_that_are_checked_beside_the_training_end_it_when_they_are_found() {
    let shop = SessionShop::new(200);
    let config = Config::load(&shop.config(), &[]).unwrap();
    let check = |n_ranks: usize, at_the_start: usize| {
        let days = Days::open(&shop.data(), &config.data).unwrap();
        let files: Vec<_> =
            (1..=3).map(|day| Arc::new(days.file(day, Split::Train).unwrap())).collect();
        let begin = move |rank| RowCheck::begin(&files, (rank, n_ranks), 2, at_the_start);
        (0..n_ranks).map(begin).collect::<Result<Vec<_>, _>>().map_err(|error| error.to_string())
    };
    // Row groups have 64 sessions; a rank checks whole ones.
    let left =
        |at_the_start| check(2, at_the_start).unwrap().iter().map(RowCheck::n_left).sum::<usize>();
    assert_eq!((left(0), left(64), left(1000)), (600, 600 - 2 * 64, 0));

    let mut sessions = session_data::sessions(200, 40, 1);
    sessions[150] = vec![41, 2];
    sessions[180] = vec![41, 2];
    session_data::write_sessions(&shop.data().join("3/train.parquet"), &sessions, |_| 0.0);
    let found = "3/train.parquet` row 150: column `product_id-list_seq` has the id 41, outside \
                 1..=39 of the schema";
    for n_ranks in [1, 2, 3] {
        let error = check(n_ranks, 1000).err().unwrap();
        assert!(error.ends_with(found), "{error}");
        let mut ranks = check(n_ranks, 64).unwrap();
        ranks.iter_mut().for_each(RowCheck::continue_in_background);
        let error = loop {
            if let Some(error) = ranks.iter_mut().find_map(|rank| rank.poll().err()) {
                break error.to_string();
            }
            sleep(Duration::from_millis(1));
        };
        assert!(error.ends_with(found), "{error}");
    }
}

#[test]
fn values_that_no_key_can_have() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.toml");
    let load = |assignment: &str| Config::load(&file, &[assignment.to_owned()]).map(drop);
    let numbers = |least_is_fine: bool| {
        let below = if least_is_fine { &["-1"][..] } else { &["-1", "0"] };
        [below, &["nan", "inf", "1.5", "\"many\"", "[1]"]].concat()
    };
    let huge = ["1000000000000", "9223372036854775807"];
    let floats = ["-1", "nan", "inf", "-inf", "1e300", "\"much\"", "{}"];
    let shares = ["-0.1", "1.0", "1.5", "nan", "inf", "\"half\""];
    let words = ["\"quick\"", "1", "true", "[]"];
    let mut cases: Vec<(&str, Vec<&str>)> = vec![
        ("run.device", words.to_vec()),
        ("run.seed", numbers(true)),
        ("run.reduction", words.to_vec()),
        ("run.precision", words.to_vec()),
        ("run.cuda_graph", words.to_vec()),
        ("run.threads_per_rank", numbers(true)),
        ("run.compare_ranks_every", numbers(true)),
        ("run.patience_seconds", [&floats[..], &["0"]].concat()),
        ("data.first_day", vec!["3", "9", "1.5", "\"monday\"", "9223372036854775807"]),
        ("data.last_day", vec!["1", "0", "-9223372036854775808", "nan"]),
        ("data.window_days", numbers(false)),
        ("data.max_length", [&numbers(false)[..], &["1"], &huge].concat()),
        ("data.features", vec!["1", "\"price\"", "[1]"]),
        ("parallel.item_table", words.to_vec()),
        ("train.epochs_per_day", [&numbers(false)[..], &huge].concat()),
        ("train.global_batch", [&numbers(false)[..], &["50", "4", "1000000000000"]].concat()),
        ("train.micro_batch", [&numbers(false)[..], &huge, &["7", "96"]].concat()),
        ("train.learning_rate", floats.to_vec()),
        ("train.weight_decay", floats.to_vec()),
        ("train.clip_norm", floats.to_vec()),
        ("train.max_steps_per_day", numbers(false)),
        ("train.log_every_steps", numbers(false)),
        ("train.logits_mib", [&numbers(false)[..], &huge].concat()),
        ("train.schedule", words.to_vec()),
        ("train.time_phases", vec!["1", "\"yes\""]),
        ("train.order", words.to_vec()),
        ("train.non_finite.kind", words.to_vec()),
        ("train.tables.kind", words.to_vec()),
        ("train.loss.kind", words.to_vec()),
        ("evaluate.block", [&numbers(false)[..], &huge].concat()),
        ("evaluate.scores_mib", [&numbers(false)[..], &huge].concat()),
        ("evaluate.reminders", words.to_vec()),
        ("checkpoint.every_steps", numbers(true)),
        ("checkpoint.every_minutes", floats.to_vec()),
        ("checkpoint.keep_last", numbers(true)),
        ("checkpoint.keep_days", vec!["1"]),
        ("checkpoint.keep_best", vec!["\"precision\"", "1"]),
        ("model.kind", words.to_vec()),
        ("model.dropout", shares.to_vec()),
        ("model.n_layers", [&numbers(false)[..], &huge].concat()),
        ("model.input.item_width", [&numbers(false)[..], &huge].concat()),
        ("model.input.feature_width", [&numbers(false)[..], &huge].concat()),
        ("model.input.projection_width", [&numbers(false)[..], &huge].concat()),
        ("model.input.init_std", floats.to_vec()),
        ("model.input.swap_noise", shares.to_vec()),
        ("model.input.dropout", shares.to_vec()),
        ("model.input.layer_norm", vec!["1"]),
        ("model.input.aggregation", words.to_vec()),
        ("model.input.content.n_buckets", [&numbers(false)[..], &huge].concat()),
        ("model.input.content.id_dropout", shares.to_vec()),
        ("model.input.start.kind", words.to_vec()),
        ("model.head.relu", vec!["1"]),
        ("model.head.cosine", vec!["1"]),
        ("model.head.evidence.hidden_width", [&numbers(false)[..], &huge].concat()),
        ("model.head.evidence.candidates.n_candidates", [&numbers(false)[..], &huge].concat()),
        ("model.head.evidence.candidates.n_recent", [&numbers(false)[..], &huge].concat()),
        ("model.head.evidence.candidates.n_neighbours", [&numbers(true)[..], &huge].concat()),
        ("model.head.evidence.candidates.n_frequent", [&numbers(true)[..], &huge].concat()),
        ("model.head.tied", vec!["\"no\""]),
        ("model.head.temperature", [&floats[..], &["0", "1e-300"]].concat()),
        ("model.objective.kind", words.to_vec()),
    ];
    let mut problems = Vec::new();
    let mut try_all = |config: &str, cases: &[(&str, Vec<&str>)]| {
        fs::write(&file, config).unwrap();
        load("run.seed=1").unwrap();
        for (key, values) in cases {
            for value in values {
                let Err(error) = load(&format!("{key}={value}")) else {
                    problems.push(format!("`{key}` may be {value}"));
                    continue;
                };
                let text = error.to_string();
                let is_named = text.contains(key.rsplit('.').next().unwrap());
                if !is_named || text.lines().count() != 1 || text.len() >= 300 {
                    problems.push(format!("{key} {value}: {text}"));
                }
            }
        }
    };
    let gru = ("model.hidden_width", [&numbers(false)[..], &huge].concat());
    try_all(CONFIG, &[&cases[..], &[gru]].concat());
    cases.extend([
        ("model.width", [&numbers(false)[..], &huge, &["17"]].concat()),
        ("model.n_heads", [&numbers(false)[..], &huge, &["3", "32"]].concat()),
        ("model.init_std", [&floats[..], &["0"]].concat()),
        ("model.layer_norm_epsilon", [&floats[..], &["0"]].concat()),
        ("model.attend_to_padding", vec!["1"]),
        // The dropout of attention is drawn for the longest session.
        ("data.max_length", vec!["60000"]),
    ]);
    try_all(&config_with(XLNET), &cases);
    /// A key and values that it cannot have.
    type Values<'a> = (&'a str, &'a [&'a str]);
    let objectives: [(&str, &[Values<'_>]); 4] = [
        ("causal", &[("drop", &shares), ("reverse", &shares)]),
        ("masked", &[("probability", &["0", "1", "-1", "nan", "1e-300", "\"x\""])]),
        (
            "permutation",
            &[("probability", &["0", "1", "1e-300"]), ("max_span", &["0", "-1", "1000000000"])],
        ),
        ("replaced", &[("weight", &["-1", "nan", "1e300"]), ("probability", &["2"])]),
    ];
    for (kind, keys) in objectives {
        let cases: Vec<(String, Vec<&str>)> = keys
            .iter()
            .map(|(key, values)| (format!("model.objective.{key}"), values.to_vec()))
            .collect();
        let cases: Vec<(&str, Vec<&str>)> =
            cases.iter().map(|(key, values)| (key.as_str(), values.clone())).collect();
        let gru = "kind = \"gru\"\n[model.objective]\nkind = ";
        try_all(&config_with(&format!("{gru}\"{kind}\"\n")), &cases);
    }
    let negatives = ["0", "-1", "nan", "\"all\""];
    for (loss, key, values) in [
        ("sampled", "power", &["nan", "inf", "1e300", "-100"][..]),
        ("sampled", "in_batch", &["1"]),
        ("gbce", "calibration", &["-0.1", "1.1", "nan"]),
    ] {
        let loss = format!("{CONFIG}\n[train.loss]\nkind = \"{loss}\"\nn_negatives = 5\n");
        let key = format!("train.loss.{key}");
        try_all(&loss, &[(&key, values.to_vec()), ("train.loss.n_negatives", negatives.to_vec())]);
    }
    let softmax = format!("{CONFIG}\n[train.loss]\nkind = \"softmax\"\n");
    try_all(&softmax, &[("train.loss.label_smoothing", shares.to_vec())]);
    let adagrad = format!("{CONFIG}\n[train.tables]\nkind = \"adagrad\"\nlearning_rate = 0.1\n");
    let rates = [
        ("train.tables.learning_rate", floats.to_vec()),
        ("train.tables.momentum", shares.to_vec()),
    ];
    try_all(&adagrad, &rates);
    let vsknn = [
        ("model.k", [&numbers(false)[..], &["9999"]].concat()),
        ("model.sample_size", [&numbers(false)[..], &["3"]].concat()),
        ("model.weighting", words.to_vec()),
        ("model.score_weighting", words.to_vec()),
        ("model.idf_weight", vec!["-1", "nan", "inf"]),
    ];
    try_all(&config_with("kind = \"vsknn\"\n"), &vsknn);
    assert!(problems.is_empty(), "{problems:#?}");
}

#[test]
fn values_that_do_not_suit_the_data_or_the_host() {
    let shop = SessionShop::new(20);
    for (assignment, message) in [
        ("run.threads_per_rank=100000", "`threads_per_rank` cannot be 100000: at most "),
        (
            "train.loss={kind = \"sampled\", n_negatives = 39}",
            "`loss.n_negatives` 39 is more than the 38 items of the catalogue",
        ),
        // Widths that are numbers, of matrices that no memory holds.
        ("model.hidden_width=1000000", "`model.n_layers` 1 of `model.hidden_width` 1000000, "),
        ("model.input.item_width=1000000000", "`input.item_width` cannot be 1000000000: at most "),
    ] {
        let finished = shop.train("run", &["--set", assignment]);
        refused(&finished, message);
    }
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn models_too_large_for_memory() {
    let shop = SessionShop::new(20);
    shop.train("run", &[]).success();
    let item_table = "by `model.input.item_width` 16, ";
    for max in [1_i64 << 40, 1 << 61, i64::MAX - 1] {
        session_data::write_schema(&shop.data(), max.saturating_add(1));
        let items = format!("the item table of {} items (`schema.pbtxt`)", max + 1);
        let finished = shop.train("large", &[]);
        refused(&finished, &items);
        for message in [
            item_table,
            " GiB of memory, ",
            "times 4 (values, gradient, optimizer)",
            "looks like a raw id",
        ] {
            assert!(finished.stderr.contains(message), "{message}\n{finished:#?}");
        }
    }
    session_data::write_schema(&shop.data(), 1 << 40);
    if let Some(finished) = shop.train_on(2, "large", &["--set", "parallel.item_table=sharded"]) {
        refused(&finished, "the 2 ranks on ");
        assert!(finished.stderr.contains("549755813888 rows of the item table"), "{finished:#?}");
    }
    refused(&shop.evaluate("run", &[]), " GiB of memory, ");
    for kind in ["popularity", "recent", "markov"] {
        fs::write(shop.config(), config_with(&format!("kind = \"{kind}\"\n"))).unwrap();
        refused(&shop.train("large", &[]), "counts of 1099511627776 items (`schema.pbtxt`)");
    }
    fs::write(shop.config(), config_with("kind = \"vsknn\"\n")).unwrap();
    refused(
        &shop.train("large", &[]),
        "`kind` vsknn knows at most 4294967296 items, not 1099511627776",
    );
    assert!(!shop.run_dir("large").exists());
}

#[test]
fn days_that_a_run_cannot_have() {
    let shop = SessionShop::new(20);
    let (_, rest) = CONFIG.split_once("[model]").unwrap();
    fs::write(shop.config(), format!("[run]\ndevice = \"cpu\"\n[model]{rest}")).unwrap();
    let day = |day: &str| shop.data().join(day);
    for (assignment, message) in [
        ("data.first_day=3", "`data.first_day` 3 is not before `data.last_day` 3: "),
        ("data.last_day=1", "`data.first_day` 1 is not before `data.last_day` 1: "),
        ("data.last_day=9", "no day 4 under"),
    ] {
        refused(&shop.train("run", &["--set", assignment]), message);
    }
    fs::rename(day("2"), shop.dir.path().join("elsewhere")).unwrap();
    refused(&shop.train("run", &[]), "no day 2 under");
    fs::remove_dir_all(day("1")).unwrap();
    refused(&shop.train("run", &[]), "holds the day 3 alone");
    fs::remove_dir_all(day("3")).unwrap();
    refused(&shop.train("run", &[]), "holds no day partitions");
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn weights_in_other_formats() {
    let shop = SessionShop::new(20);
    let file = shop.dir.path().join("model.pth");
    fs::write(&file, b"PK\x03\x04 archive/data.pkl").unwrap();
    let mut command = Command::new(PROGRAM);
    command.arg("import-weights").arg("--weights").arg(&file).args(["--day", "2"]);
    command.arg("--config").arg(shop.config()).arg("--data").arg(shop.data());
    let finished = run_within(command.arg("--run-dir").arg(shop.run_dir("run")), LIMIT);
    refused(&finished, "model.pth` is a zip archive, as PyTorch saves, not a safetensors file");
    assert!(finished.stderr.contains("hint: convert it: `python -c"), "{finished:#?}");
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn more_ranks_than_work() {
    let shop = SessionShop::new(1);
    let one_day = ["--set", "data.last_day=2"];
    let Some(finished) = shop.train_on(2, "run", &one_day) else { return };
    refused(&finished, "2 ranks are more than the 1 training sessions of days 1 to 1");
    let Some(finished) = shop.train_on(2, "run", &["--set", "train.micro_batch=48"]) else {
        return;
    };
    refused(&finished, "2 ranks are more than the 1 micro-batches of a global batch");
    assert!(!shop.run_dir("run").exists());
}

#[test]
fn a_run_directory_that_is_taken_is_left_alone() {
    let shop = SessionShop::new(20);
    shop.train("run", &[]).success();
    let before = fs::read(shop.run_dir("run").join("metrics.jsonl")).unwrap();
    refused(&shop.train("run", &["--resume=never"]), "already holds a run");
    refused(
        &shop.train("run", &["--set", "run.seed=1"]),
        "another configuration: `run.seed` was 42, and is 1 now",
    );
    assert_eq!(fs::read(shop.run_dir("run").join("metrics.jsonl")).unwrap(), before);
    shop.train("run", &["--overwrite", "--set", "run.seed=1"]).success();
    assert_ne!(fs::read(shop.run_dir("run").join("metrics.jsonl")).unwrap(), before);
}

#[test]
fn a_run_that_cannot_be_evaluated() {
    let shop = SessionShop::new(20);
    let evaluate = |run: &str, more: &[&str]| shop.evaluate(run, more);
    refused(&evaluate("nowhere", &[]), "cannot read the configuration");
    shop.train("run", &[]).success();
    refused(&evaluate("run", &["--day", "7"]), "no day 7 under");
    session_data::write_schema(&shop.data(), 50);
    refused(&evaluate("run", &[]), "it counts 40 items, the schema has 50");
    session_data::write_schema(&shop.data(), 40);
    let checkpoints = shop.run_dir("run").join("checkpoints");
    for entry in fs::read_dir(&checkpoints).unwrap() {
        fs::remove_file(entry.unwrap().path().join("manifest.json")).unwrap();
    }
    refused(&evaluate("run", &[]), "holds no complete checkpoint");
}
