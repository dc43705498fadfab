//! An exported repository in a real Triton Inference Server, asked by its own client.
//!
//! The server comes out of a Python package that lacks the PyTorch backend: a stand-in (tests/pytorch_standin) loads the
//! TorchScript in its place. What the official backend asks beyond that is checked when a model is exported.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use bireme::etl::serving::Preprocessor;
use bireme::export::ScriptedModel;
use serde_json::json;
use tch::Device;

use crate::export::{MODELS, Shop, prepared, request_of_rows};
use crate::mpirun::run_within;
use crate::train::PROGRAM;

/// The folder that tests/serving/install.sh makes. A test without it is skipped.
fn triton() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(".triton");
    if dir.join("VERSION").is_file() {
        return Some(dir);
    }
    assert!(std::env::var_os("REQUIRE_TRITON").is_none(), "tests/serving/install.sh has not been run");
    println!("skipped: there is no Triton in `{}` (tests/serving/install.sh)", dir.display());
    None
}

/// A port that nothing listens on.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A server that is ended with the test.
struct Server {
    process: Child,
    http: String,
    grpc: String,
}

impl Server {
    fn start(triton: &Path, repository: &Path, scratch: &Path) -> Self {
        let server = triton.join("server");
        let backends = scratch.join("backends");
        fs::create_dir_all(backends.join("pytorch")).unwrap();
        symlink(server.join("backends/python"), backends.join("python")).unwrap();
        let stand_in = Path::new(PROGRAM).with_file_name("libtriton_pytorch.so");
        fs::copy(stand_in, backends.join("pytorch/libtriton_pytorch.so")).unwrap();
        let (http, grpc) = (free_port(), free_port());
        let path = format!("{}:{}", triton.join("bin").display(), std::env::var("PATH").unwrap());
        let log = fs::File::create(scratch.join("server.log")).unwrap();
        let process = Command::new(server.join("bin/tritonserver"))
            .env("PATH", path)
            .arg(format!("--model-repository={}", repository.display()))
            .arg(format!("--backend-directory={}", backends.display()))
            .args(["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--allow-metrics=false"])
            .args([format!("--http-port={http}"), format!("--grpc-port={grpc}")])
            .args(["--model-control-mode=explicit", "--exit-timeout-secs=5"])
            .stdout(Stdio::from(log.try_clone().unwrap()))
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap();
        let server = Self { process, http: format!("127.0.0.1:{http}"), grpc: format!("127.0.0.1:{grpc}") };
        let begun = Instant::now();
        while std::net::TcpStream::connect(&server.http).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "the server does not answer");
            sleep(Duration::from_millis(50));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_real_triton_serves_what_was_exported() {
    let Some(triton) = triton() else { return };
    let shop = Shop::small();
    let library = Path::new(PROGRAM).with_file_name(bireme::export::LIBRARY);
    let [(gru, gru_config), _, (xlnet, xlnet_config), ..] = MODELS;
    shop.train(gru, gru_config);
    shop.train(xlnet, xlnet_config);
    shop.export_with(gru, &["--backend-library", library.to_str().unwrap()]).success();
    shop.export_with(xlnet, &["--backend-library", library.to_str().unwrap()]).success();
    // The same model behind preprocessing in Python.
    let (run, python) = (shop.path(gru), "in_python");
    let repository = PathBuf::from(shop.path("repository"));
    let out = repository.to_str().unwrap();
    shop.run(&["export", "--run-dir", &run, "--out", out, "--name", python, "--python-backend"]).success();

    let (events, columns) = shop.first_events(300);
    let request = request_of_rows(&events, 10);
    let mut expected = serde_json::Map::new();
    let mut sessions = Vec::new();
    for model in [gru, xlnet, python] {
        let etl = Preprocessor::load(&repository.join(format!("{model}_etl/1"))).unwrap();
        let views: Vec<_> = request.iter().map(|tensor| tensor.view()).collect();
        let outputs = etl.apply(&views, &[]).unwrap();
        sessions = outputs[0].view().texts().unwrap().into_iter().map(str::to_owned).collect();
        let scripted = ScriptedModel::load(&repository, model, 0, Device::Cpu).unwrap();
        let outputs = scripted.run(prepared(&etl, &request, &[])).unwrap();
        let (ids, scores) = (Vec::<Vec<i64>>::try_from(&outputs[1]), Vec::<Vec<f32>>::try_from(&outputs[2]));
        expected
            .insert(model.to_owned(), json!({ "item_ids": ids.unwrap(), "item_scores": scores.unwrap() }));
    }
    let configs: Vec<PathBuf> =
        fs::read_dir(&repository).unwrap().map(|entry| entry.unwrap().path().join("config.pbtxt")).collect();
    assert_eq!(configs.len(), 12);
    let cases = json!({
        "models": [gru, xlnet, python],
        "configs": configs,
        "events": columns,
        "sessions": sessions,
        "expected": expected,
    });
    let cases_file = shop.path("cases.json");
    fs::write(&cases_file, cases.to_string()).unwrap();
    let scratch = PathBuf::from(shop.path("server"));
    fs::create_dir(&scratch).unwrap();
    let server = Server::start(&triton, &repository, &scratch);
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serving/client.py");
    let mut command = Command::new(triton.join("bin/python"));
    command.arg(client).args([&server.http, &server.grpc, &cases_file]);
    let finished = run_within(&mut command, Duration::from_secs(240));
    let log = fs::read_to_string(scratch.join("server.log")).unwrap();
    assert_eq!(finished.code, Some(0), "{finished:#?}\n{log}");
}
