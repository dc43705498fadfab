//! A shop that starts at events: preprocesses them, trains, exports and evaluates.

use std::fs;
use std::path::{Path, PathBuf};

use bireme::etl::serving::{INPUTS, RequestInput};
use bireme_protocol::DataType;
use serde_json::Value;
use tempfile::TempDir;

use super::process::{Finished, bireme};
use super::requests::{Event, events_by_session};

/// A folder with events, data, runs and a model repository.
pub struct EventShop(TempDir);

impl EventShop {
    /// Preprocesses a file of events.
    pub fn of_events(events: &Path, days: &str) -> Self {
        Self(tempfile::tempdir().unwrap()).preprocessed(events, days)
    }

    fn preprocessed(self, events: &Path, days: &str) -> Self {
        let data = self.path("data");
        let paths =
            ["preprocess", "--events", events.to_str().unwrap(), "--out", &data, "--days", days];
        self.run(&paths).success();
        self
    }

    /// Two days of synthetic events of 300 products.
    pub fn small() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let events = dir.path().join("events.csv");
        let shop = Self(dir);
        let size = ["--events", "12000", "--items", "300", "--days", "2", "--seed", "5"];
        shop.run(&[&["synth", "--out", events.to_str().unwrap()], &size[..]].concat()).success();
        shop.preprocessed(&events, "1..2")
    }

    /// Sessions of three events each, over `n_items` products of which the first has the id −1.
    pub fn tiny(n_items: i64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut csv = "event_time,event_type,product_id,category_id,category_code,brand,price,\
                       user_id,user_session\n"
            .to_owned();
        for day in 1..=2 {
            for session in 0..40 {
                for event in 0..3 {
                    let time = format!("2019-10-0{day} 00:{session:02}:0{event} UTC");
                    let product = (session + event) % n_items - 1;
                    csv += &format!("{time},view,{product},7,,,1,1,s{day}-{session}\n");
                }
            }
        }
        let events = dir.path().join("events.csv");
        fs::write(&events, csv).unwrap();
        Self(dir).preprocessed(&events, "1..2")
    }

    /// A path in the folder.
    pub fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Runs `bireme`.
    pub fn run(&self, arguments: &[&str]) -> Finished {
        bireme(arguments)
    }

    /// The first `n` events by time, as rows and as the columns of a request.
    pub fn first_events(&self, n: usize) -> (Vec<Event>, Value) {
        let sessions = events_by_session(Path::new(&self.path("events.csv")));
        let mut events: Vec<Event> = sessions.into_values().flatten().collect();
        let key = |event: &Event| (event["event_time"].clone(), event["user_session"].clone());
        events.sort_by_cached_key(key);
        events.truncate(n);
        let column = |input: &RequestInput| {
            let cells = events.iter().map(|event| &event[input.name]);
            let values: Vec<Value> = match input.datatype {
                DataType::Bytes => cells.map(|cell| cell.as_str().into()).collect(),
                DataType::Fp64 => cells.map(|cell| cell.parse::<f64>().unwrap().into()).collect(),
                _ => cells.map(|cell| cell.parse::<i64>().unwrap_or_default().into()).collect(),
            };
            (input.name.to_owned(), values.into())
        };
        let columns = INPUTS.iter().filter(|input| input.dims.len() == 2).map(column);
        let columns = columns.collect::<serde_json::Map<_, _>>();
        (events, columns.into())
    }

    /// Trains run `name` for a few steps.
    pub fn train(&self, name: &str, config: &str) {
        let file = self.path(&format!("{name}.toml"));
        let days = "first_day = 1\nlast_day = 2";
        let train = "[train]\nmax_steps_per_day = 8\nlearning_rate = 0.02\n";
        fs::write(&file, format!("[data]\n{days}\n{config}\n{train}")).unwrap();
        let (data, run) = (self.path("data"), self.path(name));
        self.run(&["train", "--config", &file, "--data", &data, "--run-dir", &run]).success();
    }

    /// A placeholder for the library that preprocesses in Triton, which not every test run builds.
    /// `bireme export` only copies it; `bireme serve` and `bireme recommend` preprocess themselves.
    pub fn library(&self) -> PathBuf {
        let path = PathBuf::from(self.path(bireme::export::LIBRARY));
        fs::write(&path, "\x7fELF TRITONBACKEND_ModelInstanceExecute").unwrap();
        path
    }

    /// Exports run `name` to `repository`.
    pub fn export(&self, name: &str, more: &[&str]) -> Finished {
        self.export_with_library(name, &self.library(), more)
    }

    /// Exports run `name` to `repository` with this library for Triton.
    pub fn export_with_library(&self, name: &str, library: &Path, more: &[&str]) -> Finished {
        let (run, out) = (self.path(name), self.path("repository"));
        let library = library.to_str().unwrap();
        let arguments = ["export", "--run-dir", &run, "--out", &out, "--name", name];
        self.run(&[&arguments[..], &["--backend-library", library], more].concat())
    }

    /// Evaluates run `name` and returns the record.
    pub fn evaluate(&self, name: &str, more: &[&str]) -> Value {
        let (data, run) = (self.path("data"), self.path(name));
        let arguments = ["evaluate", "--run-dir", &run, "--data", &data];
        let finished = self.run(&[&arguments[..], more].concat()).success();
        serde_json::from_str(finished.stdout.lines().last().unwrap()).unwrap()
    }
}
