//! `bireme serve` and a real Triton Inference Server answer alike, asked by Triton's own client.
//!
//! The server comes from a Python package without the PyTorch backend. A stand-in of it
//! (tests/pytorch_standin) loads the TorchScript; the export checks what the official backend
//! needs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bireme::etl::serving::Preprocessor;
use bireme::export::ScriptedModel;
use serde_json::json;
use tch::Device;

use crate::support::configs::MODELS;
use crate::support::event_shop::EventShop;
use crate::support::process::{LIMIT, PROGRAM, run_within};
use crate::support::requests::{prepared, request_of_rows};
use crate::support::requirements::triton;
use crate::support::server::Server;

/// An exported repository, and what is expected of it.
struct Exported {
    shop: EventShop,
    repository: PathBuf,
    cases: String,
}

impl Exported {
    fn new() -> Self {
        let shop = EventShop::small();
        let library = Path::new(PROGRAM).with_file_name(bireme::export::LIBRARY);
        let [(gru, _), _, (xlnet, _), (evidence, _), ..] = MODELS;
        for (model, config) in [MODELS[0], MODELS[2], MODELS[3]] {
            shop.train(model, config);
            shop.export_with_library(model, &library, &[]).success();
        }
        let repository = PathBuf::from(shop.path("repository"));

        let (events, columns) = shop.first_events(300);
        let request = request_of_rows(&events, 10);
        let mut expected = serde_json::Map::new();
        let mut sessions = Vec::new();
        for model in [gru, xlnet, evidence] {
            let etl = Preprocessor::load(&repository.join(format!("{model}_etl/1"))).unwrap();
            let views: Vec<_> = request.iter().map(|tensor| tensor.view()).collect();
            let outputs = etl.apply(&views, &[]).unwrap();
            sessions = outputs[0].view().texts().unwrap().into_iter().map(str::to_owned).collect();
            let scripted = ScriptedModel::load(&repository, model, 0, Device::Cpu).unwrap();
            let outputs = scripted.run(prepared(&etl, &request, &[])).unwrap();
            let (ids, scores) =
                (Vec::<Vec<i64>>::try_from(&outputs[1]), Vec::<Vec<f32>>::try_from(&outputs[2]));
            let of_model = json!({ "item_ids": ids.unwrap(), "item_scores": scores.unwrap() });
            expected.insert(model.to_owned(), of_model);
        }
        let configs: Vec<PathBuf> = fs::read_dir(&repository)
            .unwrap()
            .map(|entry| entry.unwrap().path().join("config.pbtxt"))
            .collect();
        assert_eq!(configs.len(), 12);
        let of_client = json!({
            "models": [gru, xlnet, evidence],
            "preprocessing": format!("{xlnet}_etl"),
            "configs": configs,
            "events": columns,
            "sessions": sessions,
            "expected": expected,
        });
        let cases = shop.path("cases.json");
        fs::write(&cases, of_client.to_string()).unwrap();
        Self { shop, repository, cases }
    }

    /// Runs all checks of the client. Returns its line about random requests.
    fn ask(&self, triton: &Path, server: &Server, key: &[&str]) -> String {
        let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serving/client.py");
        let mut command = Command::new(triton.join("bin/python"));
        command.arg(client).args([&server.http, &server.grpc, &self.cases]).args(key);
        let finished = run_within(&mut command, LIMIT);
        assert_eq!(finished.code, Some(0), "{finished:#?}\n{}", server.log());
        let random = finished.stdout.lines().find(|line| line.starts_with("random events: "));
        random.unwrap().to_owned()
    }

    /// Runs the example client, and counts its lines.
    fn ask_for_names(&self, triton: &Path, server: &Server) {
        let mut command = Command::new(triton.join("bin/python"));
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/ask.py"));
        command.arg(&self.repository).args([
            "gru",
            &self.shop.path("events.csv"),
            "--http",
            &server.http,
        ]);
        let finished = run_within(&mut command, LIMIT).success();
        let lines =
            |begin: &str| finished.stdout.lines().filter(|line| line.starts_with(begin)).count();
        assert_eq!((lines("session "), lines("  next ")), (2, 10), "{finished:#?}");
    }
}

#[test]
fn a_real_triton_and_our_own_server_answer_alike() {
    let Some(triton) = triton() else { return };
    let exported = Exported::new();
    let scratch = PathBuf::from(exported.shop.path("server"));
    fs::create_dir(&scratch).unwrap();
    let keys = exported.shop.path("keys");
    fs::write(&keys, "open sesame\n").unwrap();
    let more = ["--load", "gru", "--api-keys", &keys];
    let server = Server::bireme(&exported.repository, scratch.join("bireme.log"), &more);
    let ours = exported.ask(&triton, &server, &["open sesame"]);
    assert!(server.end().success());
    let server = Server::triton(&triton, &exported.repository, &scratch);
    assert_eq!(exported.ask(&triton, &server, &[]), ours);
    exported.ask_for_names(&triton, &server);
    assert!(server.end().success());
}
