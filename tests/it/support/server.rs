//! Starts `bireme serve` and a Triton Inference Server.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::process::{PROGRAM, exit_status_within, kill};

/// A port that nothing listens on.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A server process, killed when dropped.
pub struct Server {
    process: Child,
    pub http: String,
    pub grpc: String,
    log: PathBuf,
}

impl Server {
    fn start(command: &mut Command, log: PathBuf, [http, grpc]: [u16; 2]) -> Self {
        let file = fs::File::create(&log).unwrap();
        let process =
            command.stdout(Stdio::from(file.try_clone().unwrap())).stderr(Stdio::from(file));
        let process = process.spawn().unwrap();
        let [http, grpc] = [http, grpc].map(|port| format!("127.0.0.1:{port}"));
        let mut server = Self { process, http, grpc, log };
        let start = Instant::now();
        for address in [server.http.clone(), server.grpc.clone()] {
            while TcpStream::connect(&address).is_err() {
                let ended = server.process.try_wait().unwrap();
                let is_starting = ended.is_none() && start.elapsed() < Duration::from_secs(60);
                assert!(is_starting, "{ended:?} {}", server.log());
                sleep(Duration::from_millis(50));
            }
        }
        server
    }

    /// A Triton of [`super::requirements::triton`], with nothing loaded. A stand-in serves
    /// TorchScript.
    pub fn triton(triton: &Path, repository: &Path, scratch: &Path) -> Self {
        let server = triton.join("server");
        let backends = scratch.join("backends");
        fs::create_dir_all(backends.join("pytorch")).unwrap();
        let stand_in = Path::new(PROGRAM).with_file_name("libtriton_pytorch.so");
        fs::copy(stand_in, backends.join("pytorch/libtriton_pytorch.so")).unwrap();
        let ports = [free_port(), free_port()];
        let mut command = Command::new(server.join("bin/tritonserver"));
        command
            .arg(format!("--model-repository={}", repository.display()))
            .arg(format!("--backend-directory={}", backends.display()))
            .args(["--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--allow-metrics=false"])
            .args([format!("--http-port={}", ports[0]), format!("--grpc-port={}", ports[1])])
            .args(["--model-control-mode=explicit", "--exit-timeout-secs=5"]);
        Self::start(&mut command, scratch.join("server.log"), ports)
    }

    /// `bireme serve` with these further arguments.
    pub fn bireme(repository: &Path, log: PathBuf, more: &[&str]) -> Self {
        let ports = [free_port(), free_port()];
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--device", "cpu", "--repository"]).arg(repository);
        for (flag, port) in ["--http", "--grpc"].iter().zip(ports) {
            command.arg(flag).arg(format!("127.0.0.1:{port}"));
        }
        command.args(more);
        Self::start(&mut command, log, ports)
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Asks the server to end, and waits for it.
    pub fn end(mut self) -> ExitStatus {
        kill("TERM", self.process.id());
        let status = exit_status_within(&mut self.process, Duration::from_secs(30));
        status.unwrap_or_else(|| panic!("the server does not end: {}", self.log()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
