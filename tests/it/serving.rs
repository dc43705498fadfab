//! An exported repository in `bireme serve` and in a real Triton Inference Server, asked by Triton's own client.
//!
//! That server comes out of a Python package that lacks the PyTorch backend: a stand-in (tests/pytorch_standin) loads the
//! TorchScript in its place. What the official backend asks beyond that is checked when a model is exported.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
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
pub struct Server {
    process: Child,
    pub http: String,
    pub grpc: String,
    log: PathBuf,
}

impl Server {
    fn start(command: &mut Command, log: PathBuf, [http, grpc]: [u16; 2]) -> Self {
        let file = fs::File::create(&log).unwrap();
        let process = command.stdout(Stdio::from(file.try_clone().unwrap())).stderr(Stdio::from(file));
        let process = process.spawn().unwrap();
        let [http, grpc] = [http, grpc].map(|port| format!("127.0.0.1:{port}"));
        let mut server = Self { process, http, grpc, log };
        let begun = Instant::now();
        for address in [server.http.clone(), server.grpc.clone()] {
            while std::net::TcpStream::connect(&address).is_err() {
                let ended = server.process.try_wait().unwrap();
                assert!(
                    ended.is_none() && begun.elapsed() < Duration::from_secs(60),
                    "{ended:?} {}",
                    server.log()
                );
                sleep(Duration::from_millis(50));
            }
        }
        server
    }

    fn triton(triton: &Path, repository: &Path, scratch: &Path) -> Self {
        let server = triton.join("server");
        let backends = scratch.join("backends");
        fs::create_dir_all(backends.join("pytorch")).unwrap();
        symlink(server.join("backends/python"), backends.join("python")).unwrap();
        let stand_in = Path::new(PROGRAM).with_file_name("libtriton_pytorch.so");
        fs::copy(stand_in, backends.join("pytorch/libtriton_pytorch.so")).unwrap();
        let ports = [free_port(), free_port()];
        let path = format!("{}:{}", triton.join("bin").display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(server.join("bin/tritonserver"));
        command
            .env("PATH", path)
            .arg(format!("--model-repository={}", repository.display()))
            .arg(format!("--backend-directory={}", backends.display()))
            .args(["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--allow-metrics=false"])
            .args([format!("--http-port={}", ports[0]), format!("--grpc-port={}", ports[1])])
            .args(["--model-control-mode=explicit", "--exit-timeout-secs=5"]);
        Self::start(&mut command, scratch.join("server.log"), ports)
    }

    /// `bireme serve`, with nothing loaded that is not named.
    pub fn bireme(repository: &Path, log: PathBuf, more: &[&str]) -> Self {
        let ports = [free_port(), free_port()];
        let mut command = Command::new(PROGRAM);
        command
            .args(["serve", "--device", "cpu", "--repository"])
            .arg(repository)
            .args([
                "--http",
                &format!("127.0.0.1:{}", ports[0]),
                "--grpc",
                &format!("127.0.0.1:{}", ports[1]),
            ])
            .args(more);
        Self::start(&mut command, log, ports)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Tells the server to end, and waits for it.
    pub fn end(mut self) -> ExitStatus {
        let kill = format!("kill -s TERM {}", self.process.id());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
        let begun = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "the server does not end: {}", self.log());
            sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An exported repository, and what is expected of it.
struct Exported {
    shop: Shop,
    repository: PathBuf,
    cases: String,
}

impl Exported {
    fn new() -> Self {
        let shop = Shop::small();
        let library = Path::new(PROGRAM).with_file_name(bireme::export::LIBRARY);
        let [(gru, gru_config), _, (xlnet, xlnet_config), ..] = MODELS;
        shop.train(gru, gru_config);
        shop.train(xlnet, xlnet_config);
        shop.export_with(gru, &["--backend-library", library.to_str().unwrap()]).success();
        shop.export_with(xlnet, &["--backend-library", library.to_str().unwrap()]).success();
        // The same model behind preprocessing in Python.
        let (run, python) = (shop.path(xlnet), "in_python");
        let repository = PathBuf::from(shop.path("repository"));
        let out = repository.to_str().unwrap();
        shop.run(&["export", "--run-dir", &run, "--out", out, "--name", python, "--python-backend"])
            .success();

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
            "models": [gru, xlnet, python],
            "alike": [format!("{xlnet}_etl"), format!("{python}_etl")],
            "configs": configs,
            "events": columns,
            "sessions": sessions,
            "expected": expected,
        });
        let cases = shop.path("cases.json");
        fs::write(&cases, of_client.to_string()).unwrap();
        Self { shop, repository, cases }
    }

    /// Has the client ask all that it can.
    fn ask(&self, triton: &Path, server: &Server, key: &[&str]) {
        let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serving/client.py");
        let mut command = Command::new(triton.join("bin/python"));
        command.arg(client).args([&server.http, &server.grpc, &self.cases]).args(key);
        let finished = run_within(&mut command, Duration::from_secs(240));
        assert_eq!(finished.code, Some(0), "{finished:#?}\n{}", server.log());
    }

    /// Has the example for clients ask, and counts what it tells.
    fn ask_for_names(&self, triton: &Path, server: &Server) {
        let mut command = Command::new(triton.join("bin/python"));
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("launch/ask.py"));
        command.arg(&self.repository).args(["gru", &self.shop.path("events.csv"), "--http", &server.http]);
        let finished = run_within(&mut command, Duration::from_secs(60)).success();
        let lines = |begin: &str| finished.stdout.lines().filter(|line| line.starts_with(begin)).count();
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
    exported.ask(&triton, &server, &["open sesame"]);
    assert!(server.end().success());
    let server = Server::triton(&triton, &exported.repository, &scratch);
    exported.ask(&triton, &server, &[]);
    exported.ask_for_names(&triton, &server);
    assert!(server.end().success());
}
