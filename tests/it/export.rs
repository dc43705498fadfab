//! An exported model prepares, scores and ranks like the trained one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bireme::checkpoint::Checkpoints;
use bireme::config::Config;
use bireme::data::{Batch, Days, Split};
use bireme::etl::serving::Preprocessor;
use bireme::etl::{Coded, ColumnValue, Workflow};
use bireme::export::ScriptedModel;
use bireme::model::{Network, Recommender};
use bireme_protocol::Parameter;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Value as Json, json};
use tch::{Device, Kind, Tensor};

use crate::support::configs::MODELS;
use crate::support::event_shop::EventShop;
use crate::support::files::{contents_below, root};
use crate::support::mpirun::mpirun;
use crate::support::process::{LIMIT, PROGRAM, run_within};
use crate::support::requests::{Event, events_by_session, prepared, request, request_of_rows};
use crate::support::requirements::shared;
use crate::support::tensors::distance;

#[test]
fn an_exported_model_evaluates_like_the_trained_one() {
    let shop = EventShop::small();
    let repository = shop.path("repository");
    for (name, config) in MODELS {
        shop.train(name, config);
        shop.export(name, &[]).success();
        let trained = shop.evaluate(name, &[]);
        let exported = shop.evaluate(name, &["--exported", &repository, "--name", name]);
        assert!(trained["n_sessions"].as_i64().unwrap() > 50);
        for metric in ["loss", "ndcg_at_20", "recall_at_20", "coverage_at_20"] {
            let [a, b] = [&trained, &exported].map(|record| record[metric].as_f64().unwrap());
            assert!((a - b).abs() < 1e-5, "{name}: {metric} {a} and {b}");
        }
    }
    // Half of the digits of a table's numbers cost little.
    shop.export("gru", &["--tables", "bf16"]).success();
    let [a, b] = [&[][..], &["--exported", &repository, "--name", "gru"]]
        .map(|more| shop.evaluate("gru", more)["loss"].as_f64().unwrap());
    assert!((a - b).abs() < 0.02 && a != b, "{a} and {b}");
    let bytes = |version: u32| {
        let module = format!("{repository}/gru_model/{version}/model.pt");
        fs::metadata(module).unwrap().len()
    };
    // 300 items of 64 numbers.
    assert!(bytes(2) + 300 * 64 < bytes(1), "{} and {} bytes", bytes(1), bytes(2));
}

/// Trains and exports on `n_ranks` ranks; the files of the repository, `None` without `mpirun`.
fn exported_on(
    shop: &EventShop,
    config: &str,
    run: &str,
    n_ranks: usize,
) -> Option<BTreeMap<PathBuf, Vec<u8>>> {
    let [data, run, out] = ["data", run, &format!("{run}.out")].map(|name| shop.path(name));
    let mut train = Command::new(PROGRAM);
    train.args(["train", "--config", config, "--data", &data, "--run-dir", &run, "--export", &out]);
    train.args(["--set", "model.dropout=0.2", "--set", "run.device=cpu"]);
    mpirun(n_ranks, &train, LIMIT)?.success();
    let mut files = contents_below(Path::new(&out));
    // It contains the path of the run.
    files.retain(|path, _| !path.ends_with("manifest.json"));
    assert!(files.keys().any(|path| path.ends_with("model.pt")) && files.len() > 8);
    Some(files)
}

#[test]
fn reproducible_exports_are_the_same_files_on_any_number_of_ranks() {
    let shop = EventShop::small();
    let run =
        "[run]\nreduction = \"reproducible\"\nthreads_per_rank = 1\n[train]\nmax_steps_per_day = 6";
    for (name, model) in MODELS.into_iter().filter(|(name, _)| ["gru", "xlnet"].contains(name)) {
        let config = shop.path(&format!("{name}.toml"));
        fs::write(&config, format!("[data]\nfirst_day = 1\nlast_day = 2\n{model}\n{run}")).unwrap();
        let Some(expected) = exported_on(&shop, &config, &format!("{name} 1"), 1) else { return };
        for n_ranks in 2..=4 {
            let run = format!("{name} {n_ranks}");
            let Some(files) = exported_on(&shop, &config, &run, n_ranks) else { return };
            let differs = |path: &&PathBuf| files.get(*path) != expected.get(*path);
            let differing: Vec<_> = files.keys().chain(expected.keys()).filter(differs).collect();
            assert!(differing.is_empty(), "{run}: {differing:?}");
        }
    }
}

/// A tensor as tests/serving/torchscript.py reads it.
fn tensor_json(tensor: &Tensor) -> Json {
    let (shape, flat) = (tensor.size(), tensor.flatten(0, -1));
    if tensor.kind() == Kind::Int64 {
        json!({ "type": "int64", "shape": shape, "data": Vec::<i64>::try_from(flat).unwrap() })
    } else {
        json!({ "type": "float32", "shape": shape, "data": Vec::<f32>::try_from(flat).unwrap() })
    }
}

#[test]
fn the_exported_modules_give_the_same_in_python() {
    let Some(python) = std::env::var_os("BIREME_PYTORCH") else {
        println!("skipped: `BIREME_PYTORCH` names no Python with PyTorch");
        return;
    };
    let shop = EventShop::small();
    let (events, _) = shop.first_events(300);
    let request = request_of_rows(&events, 10);
    let cases = MODELS.map(|(name, config)| {
        shop.train(name, config);
        shop.export(name, &[]).success();
        let repository = PathBuf::from(shop.path("repository"));
        let etl = Preprocessor::load(&repository.join(format!("{name}_etl/1"))).unwrap();
        let inputs = prepared(&etl, &request, &[]);
        let inputs_json: Vec<Json> = inputs.iter().map(tensor_json).collect();
        let outputs =
            ScriptedModel::load(&repository, name, 0, Device::Cpu).unwrap().run(inputs).unwrap();
        json!({
            "path": repository.join(format!("{name}_model/1/model.pt")),
            "inputs": inputs_json,
            "item_ids": Vec::<Vec<i64>>::try_from(&outputs[1]).unwrap(),
            "item_scores": Vec::<Vec<f32>>::try_from(&outputs[2]).unwrap(),
        })
    });
    let path = shop.path("cases.json");
    fs::write(&path, Json::from(cases.to_vec()).to_string()).unwrap();
    let script = root().join("tests/serving/torchscript.py");
    let finished = run_within(Command::new(python).arg(script).arg(&path), LIMIT).success();
    assert_eq!(finished.stdout.matches("alike").count(), MODELS.len(), "{finished:#?}");
}

/// The events that training kept of a session, without the last: sorted, without repeats, the first
/// twenty.
fn known_events(events: &[Event]) -> Vec<&Event> {
    let mut kept: Vec<&Event> = events.iter().collect();
    kept.sort_by_key(|event| &event["event_time"]);
    kept.dedup_by(|next, event| next["product_id"] == event["product_id"]);
    kept.truncate(20);
    kept.pop();
    kept
}

/// Sessions compared of each of five days.
const DAILY: usize = 400;

#[test]
fn a_thousand_real_sessions_are_served_as_they_are_evaluated() {
    let Some(shared) = shared() else { return };
    let events = shared.join("data/rees46-electronics/events.csv");
    let shop = EventShop::of_events(&events, "1..9999");
    let features = "features = [\"brand-list_seq\", \"category_id-list_seq\", \
                    \"price_log_norm-list_seq\", \"product_recency_days_log_norm-list_seq\", \
                    \"relative_price_to_avg_categ_id-list_seq\"]";
    let evidence = "[model.head.evidence.candidates]\n\
                    attributes = [\"category_id-list_seq\", \"brand-list_seq\", \
                    \"price_log_norm-list_seq\"]";
    for (name, head) in [("model", ""), ("evidence", evidence)] {
        shop.train(
            name,
            &format!("{features}\n[model]\nkind = \"gru\"\nhidden_width = 32\n{head}"),
        );
        shop.export(name, &[]).success();
        compare_served_sessions(&shop, name, &events);
    }
}

/// Compares the scores and recommendations of the module exported from `run` with the evaluator's.
fn compare_served_sessions(shop: &EventShop, run: &str, events: &Path) {
    // The evaluator's side: sessions as preprocessing wrote them.
    let config =
        Config::load(&PathBuf::from(shop.path(&format!("{run}/config.toml"))), &[]).unwrap();
    let days = Days::open(Path::new(&shop.path("data")), &config.data).unwrap();
    let workflow = Workflow::load(Path::new(&shop.path("data/workflow"))).unwrap();
    let raw = events_by_session(events);
    let names = [1, 2, 3, 4, 5].map(|day| session_names(shop, day, &workflow));
    let neural = config.model.neural().unwrap();
    let mut network = Network::new(&neural, days.features(), 20, 0, Device::Cpu).unwrap();
    let tensors = Checkpoints::of(Path::new(&shop.path(run))).newest().unwrap().0.tensors;
    network.load_weights(&tensors.weights).unwrap();
    // And the server's.
    let (repository, n_items) = (PathBuf::from(shop.path("repository")), days.features().n_items());
    let model = ScriptedModel::load(&repository, run, n_items, Device::Cpu).unwrap();
    let etl = Preprocessor::load(&repository.join(format!("{run}_etl/1"))).unwrap();
    let mut n_compared = 0;
    for (day, names) in (1..).zip(&names) {
        let file = days.file(day, Split::Train).unwrap();
        let sessions = file.read(&file.spans(0..file.n_sessions())).unwrap();
        for rows in (0..sessions.len().min(DAILY)).collect::<Vec<_>>().chunks(100) {
            let batch = Batch::new(
                &rows.iter().map(|&row| (&sessions, row)).collect::<Vec<_>>(),
                days.features(),
            );
            let (known, _) = batch.split_last();
            let expected = network.scores(&network.encode(&known).unwrap(), 0..n_items);
            let events: Vec<&Event> =
                rows.iter().flat_map(|&row| known_events(&raw[&names[row]])).collect();
            let outputs = model.run(prepared(&etl, &request(&events), &[])).unwrap();
            assert!(distance(&outputs[0], &expected) < 1e-5);
            assert!(!bool::try_from(outputs[3].any()).unwrap());

            // The first of the ranking are the first of the scores, in products' ids.
            let of_items = expected.narrow(1, 2, n_items - 2);
            let (best, _) = of_items.topk(20, 1, true, true);
            assert!(distance(&best, &outputs[2]) < 1e-5);
            let index =
                |id: i64| i64::from(workflow.vocabulary(Coded::Product).id(ColumnValue::Int(id)));
            let ids: Vec<i64> = outputs[1].flatten(0, -1).try_into().unwrap();
            let items =
                Tensor::from_slice(&ids.into_iter().map(index).collect::<Vec<_>>()).view([-1, 20]);
            assert!(distance(&expected.gather(1, &items, false), &best) < 1e-5);
            n_compared += rows.len();
        }
    }
    assert!(n_compared >= 1000, "{n_compared}");
}

/// The original ids of the first sessions of a day's training file.
fn session_names(shop: &EventShop, day: i64, workflow: &Workflow) -> Vec<String> {
    let path = shop.path(&format!("data/sessions_by_day/{day}/train.parquet"));
    let reader = SerializedFileReader::new(fs::File::open(path).unwrap()).unwrap();
    let name = |row: Row| {
        let (_, id) = row.get_column_iter().find(|(column, _)| *column == "user_session").unwrap();
        let Field::Long(id) = id else { panic!("{id}") };
        match workflow.vocabulary(Coded::Session).value(*id as u32) {
            Some(ColumnValue::Text(text)) => text.to_owned(),
            Some(ColumnValue::Int(int)) => int.to_string(),
            None => panic!("session {id} has no name"),
        }
    };
    reader.get_row_iter(None).unwrap().take(DAILY).map(|row| name(row.unwrap())).collect()
}

#[test]
fn hidden_and_unknown_items_leave_the_rest_to_recommend() {
    let shop = EventShop::small();
    shop.train("model", MODELS[0].1);
    shop.export("model", &[]).success();
    let repository = PathBuf::from(shop.path("repository"));
    let etl = Preprocessor::load(&repository.join("model_etl/1")).unwrap();
    let products = etl.workflow().vocabulary(Coded::Product);
    let n_items = products.cardinality() as i64;
    let model = ScriptedModel::load(&repository, "model", n_items, Device::Cpu).unwrap();
    let event = |second: i64, product: i64, session: &str| -> Event {
        let cells = [
            ("event_time", format!("2019-10-03 00:{:02}:{:02} UTC", second / 60, second % 60)),
            ("event_type", "view".to_owned()),
            ("product_id", product.to_string()),
            ("category_id", "1".to_owned()),
            ("category_code", String::new()),
            ("brand", String::new()),
            ("price", "1".to_owned()),
            ("user_id", "1".to_owned()),
            ("user_session", session.to_owned()),
        ];
        cells.into_iter().collect()
    };
    let known: Vec<i64> = (2..n_items as u32)
        .map(|item| {
            if let Some(ColumnValue::Int(id)) = products.value(item) {
                id
            } else {
                panic!("{item}")
            }
        })
        .collect();
    // One session of unknown items, one of a single known item, one of all but three of the
    // catalogue.
    let mut events =
        vec![event(0, -5, "unknown"), event(1, -6, "unknown"), event(0, known[7], "one")];
    let all_but_three = known[..known.len() - 3].iter().zip(0..);
    events.extend(all_but_three.map(|(&product, second)| event(second, product, "many")));
    let request = request_of_rows(&events, 5);
    let exclude = [("exclude_seen".to_owned(), Parameter::Bool(true))];

    let outputs = model.run(prepared(&etl, &request, &exclude)).unwrap();
    let (ids, fallback) = (&outputs[1], &outputs[3]);
    assert_eq!(ids.size(), [3, 5]);
    assert_eq!(Vec::<bool>::try_from(fallback.flatten(0, -1)).unwrap(), [true, false, false]);
    assert!(bool::try_from(outputs[0].isfinite().all()).unwrap());
    let row = |row: i64| Vec::<i64>::try_from(ids.get(row)).unwrap();
    let (scores, _) = outputs[2].get(0).sort(0, true);
    assert!(distance(&scores, &outputs[2].get(0)) == 0.0, "popular items, the most popular first");
    assert!(!row(1).contains(&known[7]));
    let mut left = row(2);
    left.sort_unstable();
    let mut expected = [vec![-1, -1], known[known.len() - 3..].to_vec()].concat();
    expected.sort_unstable();
    assert_eq!(left, expected, "the three that are left, then nothing");
    assert_eq!(Vec::<i32>::try_from(outputs[4].flatten(0, -1)).unwrap(), [5, 5, 3]);
    // The scores of the whole catalogue know nothing of what is hidden.
    let again = model.run(prepared(&etl, &request, &[])).unwrap();
    assert_eq!(distance(&again[0], &outputs[0]), 0.0);
    assert_eq!(again[2].kind(), Kind::Float);
}

#[test]
fn exports_are_versions_and_what_cannot_be_exported_is_refused() {
    let shop = EventShop::small();
    shop.train("model", MODELS[0].1);
    let finished = shop.export("model", &[]).success();
    assert!(finished.stdout.contains("version 1 of `model`"), "{}", finished.stdout);
    let repository = PathBuf::from(shop.path("repository"));
    let first = fs::read(repository.join("model_model/1/model.pt")).unwrap();
    let checkpoints = fs::read_dir(shop.path("model/checkpoints")).unwrap();
    let checkpoint = checkpoints.last().unwrap().unwrap().file_name().into_string().unwrap();
    let finished = shop.export("model", &["--checkpoint", &checkpoint]).success();
    assert!(finished.stdout.contains("version 2 of `model`"), "{}", finished.stdout);
    assert!(
        fs::read(repository.join("model_model/2/model.pt")).unwrap() == first,
        "the same bytes"
    );
    let manifest = fs::read_to_string(repository.join("model/2/manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    assert_eq!(manifest["files"]["model_model/2/model.pt"]["bytes"], first.len());
    assert_eq!(manifest["metrics"][0]["eval_day"], 2);
    let left: Vec<_> =
        fs::read_dir(&repository).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 4, "{left:?}");

    shop.train("counts", "[model]\nkind = \"markov\"");
    let run = shop.path("model");
    fs::rename(shop.path("model/etl/workflow"), shop.path("model/etl/moved")).unwrap();
    let out = shop.path("elsewhere");
    let library = shop.library();
    let library = library.to_str().unwrap();
    let counts = shop.path("counts");
    let config = shop.path("model/config.toml");
    let cases: [(&str, &str, &[&str], &str); 6] = [
        (&counts, library, &[], "a Markov model, which only counts"),
        (&run, library, &[], "etl/workflow` is missing"),
        (&run, library, &["--name", "../x"], "`../x` cannot be a model's name"),
        (&run, "/nowhere.so", &[], "`/nowhere.so` does not exist"),
        (&run, &config, &[], "config.toml` is not a Triton backend"),
        ("/nowhere", library, &[], "/nowhere/config.toml"),
    ];
    for (run, library, more, message) in cases {
        let arguments = ["export", "--out", &out, "--run-dir", run, "--backend-library", library];
        let finished = shop.run(&[&arguments[..], more].concat());
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert!(finished.stderr.contains(message), "{finished:#?}");
    }
    assert!(!Path::new(&out).exists());
    fs::rename(shop.path("model/etl/moved"), shop.path("model/etl/workflow")).unwrap();
    let finished = shop.export("model", &["--python-backend"]);
    let warning = "warning: `--python-backend` is ignored";
    assert!(finished.code == Some(0) && finished.stderr.contains(warning), "{finished:#?}");
    let finished = shop.export("model", &["--checkpoint", "day-9"]);
    assert_eq!(finished.code, Some(2), "{finished:#?}");
    assert!(finished.stderr.contains(&format!("`day-9`, only `{checkpoint}`")), "{finished:#?}");
}
