//! `bireme serve` with many, slow and wrong clients, and with operators who reload models.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::read::{GzDecoder, GzEncoder, ZlibDecoder, ZlibEncoder};
use serde_json::{Value, json};

use crate::support::configs::MODELS;
use crate::support::event_shop::EventShop;
use crate::support::http::{BytesAnswer, ask, ask_bytes, exchange, read_all};
use crate::support::process::{Finished, PROGRAM};
use crate::support::requests::Event;
use crate::support::server::Server;

/// A request of one session as JSON.
fn request(events: &[Event]) -> String {
    let n = events.len();
    let column = |name: &str, datatype: &str, cell: fn(&str) -> Value| {
        let data: Vec<Value> = events.iter().map(|event| cell(&event[name])).collect();
        json!({ "name": name, "datatype": datatype, "shape": [n, 1], "data": data })
    };
    let text = |cell: &str| cell.into();
    let int = |cell: &str| cell.parse::<i64>().unwrap().into();
    let inputs = [
        column("event_time", "BYTES", text),
        column("event_type", "BYTES", text),
        column("product_id", "INT64", int),
        column("category_id", "INT64", int),
        column("brand", "BYTES", text),
        column("price", "FP64", |cell| cell.parse::<f64>().unwrap().into()),
        column("user_session", "BYTES", text),
    ];
    json!({ "inputs": inputs, "outputs": [{ "name": "item_ids" }, { "name": "item_scores" }] })
        .to_string()
}

const INFER: &str = "POST /v2/models/gru/infer";

/// A shop with an exported model, and a request to it.
fn exported() -> (EventShop, PathBuf, String) {
    let shop = EventShop::small();
    shop.train("gru", MODELS[0].1);
    shop.export("gru", &[]).success();
    let (events, _) = shop.first_events(5);
    let (repository, request) = (PathBuf::from(shop.path("repository")), request(&events));
    (shop, repository, request)
}

fn serve(repository: &Path, shop: &EventShop, more: &[&str]) -> Server {
    Server::bireme(repository, PathBuf::from(shop.path("serve.log")), more)
}

#[test]
fn a_new_version_takes_over_and_the_server_ends_without_a_lost_request() {
    let (shop, repository, request) = exported();
    let server = serve(&repository, &shop, &[]);
    let is_over = AtomicBool::new(false);
    let versions = thread::scope(|scope| {
        let client = || {
            let mut versions = Vec::new();
            loop {
                let is_last = is_over.load(Ordering::Relaxed);
                let answer = ask(&server.http, INFER, "", &request);
                assert_eq!(answer.status, 200, "{answer:?}");
                versions.push(answer.json()["model_version"].as_str().unwrap().to_owned());
                if is_last {
                    return versions;
                }
            }
        };
        let clients: Vec<_> = (0..4).map(|_| scope.spawn(client)).collect();
        shop.export("gru", &[]).success();
        for _ in 0..20 {
            let loaded = ask(&server.http, "POST /v2/repository/models/gru/load", "", "");
            assert_eq!(loaded.status, 200, "{loaded:?}");
        }
        is_over.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    for versions in versions {
        assert!(
            versions.is_sorted() && versions[0] == "1" && versions[versions.len() - 1] == "2",
            "{versions:?}"
        );
    }
    // The other ensemble is made of the same steps, and has followed.
    let statistics = ask(&server.http, "GET /v2/models/gru_model/stats", "", "").json();
    assert_eq!(statistics["model_stats"][0]["version"], "2");
    assert!(statistics["model_stats"][0]["execution_count"].as_u64() > Some(0), "{statistics}");

    // A fault in a new version leaves the old one serving.
    fs::create_dir_all(repository.join("gru_model/3")).unwrap();
    fs::write(repository.join("gru_model/3/model.pt"), "no module").unwrap();
    let refused = ask(&server.http, "POST /v2/repository/models/gru/load", "", "");
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(refused.body.contains("gru_model/3"), "{refused:?}");
    assert_eq!(ask(&server.http, INFER, "", &request).json()["model_version"], "2");

    // Requests whose bodies are still on their way when the server is told to end are answered.
    let mut streams: Vec<TcpStream> =
        (0..8).map(|_| TcpStream::connect(&server.http).unwrap()).collect();
    let head =
        format!("{INFER} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n", request.len());
    let (first, rest) = request.split_at(request.len() / 2);
    for stream in &mut streams {
        stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(first.as_bytes()))
            .unwrap();
    }
    thread::sleep(Duration::from_millis(200));
    let http = server.http.clone();
    let ending = thread::spawn(move || server.end());
    let begun = Instant::now();
    while TcpStream::connect(&http).is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(10), "the server still listens");
        thread::sleep(Duration::from_millis(20));
    }
    for mut stream in streams {
        let mut text = String::new();
        stream.write_all(rest.as_bytes()).unwrap();
        stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    }
    assert!(ending.join().unwrap().success());
}

#[test]
fn requests_have_bounded_cost() {
    let (shop, repository, request) = exported();
    let more =
        ["--max-requests", "2", "--max-body-mib", "1", "--max-rows", "100", "--timeout-ms", "5000"];
    let server = serve(&repository, &shop, &more);
    let http = server.http.as_str();
    let infer = |body: &str| ask(http, INFER, "", body);
    assert_eq!(infer(&request).status, 200);

    let statuses = thread::scope(|scope| {
        let client = || (0..20).map(|_| infer(&request)).collect::<Vec<_>>();
        let clients: Vec<_> = (0..12).map(|_| scope.spawn(client)).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect::<Vec<_>>()
    });
    let n_refused = statuses.iter().filter(|answer| answer.status == 503).count();
    let n_answered = statuses.iter().filter(|answer| answer.status == 200).count();
    assert!(
        n_refused > 0 && n_answered > 0 && n_refused + n_answered == 240,
        "{n_refused} {n_answered}"
    );
    for answer in statuses.iter().filter(|answer| answer.status == 503) {
        assert!(answer.head.contains("retry-after: 1"), "{answer:?}");
    }

    let faults: [(&str, &str, &str, u16, &str); 9] = [
        (INFER, "", "", 400, "the body is not JSON: it ends early"),
        (INFER, "", "{\"inputs\":[]}", 400, "input `event_time` is missing"),
        (INFER, "Inference-Header-Content-Length: 7\r\n", "{}", 400, "has 2 bytes"),
        ("POST /v2/models/other/infer", "", &request, 404, "unknown model `other`"),
        ("POST /v2/models/gru/versions/7/infer", "", &request, 404, "version 7"),
        ("POST /v2/models/gru/versions/x/infer", "", &request, 400, "`x`"),
        ("GET /v2/nothing", "", "", 404, "unknown endpoint"),
        ("POST /v2/repository/models/..%2Fgru/load", "", "", 400, "no model `../gru`"),
        (
            "POST /v2/repository/models/gru/load",
            "",
            "{\"parameters\":{\"config\":\"{}\"}}",
            400,
            "`config`",
        ),
    ];
    for (what, headers, body, status, message) in faults {
        let answer = ask(http, what, headers, body);
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert!(answer.json()["error"].as_str().unwrap().contains(message), "{answer:?}");
    }
    let long = infer(&" ".repeat(2 << 20));
    assert_eq!(long.status, 413, "{long:?}");
    // Nor is more waited for than comes.
    let head = format!(
        "{INFER} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 1900000\r\n\r\n"
    );
    let half_sent = exchange(http, &[head.as_bytes(), &[b' '; 1_500_000]].concat()).unwrap();
    assert_eq!(half_sent.status, 413, "{half_sent:?}");
    let rows = request.replace("[5,1]", "[101,1]");
    assert_ne!(infer(&rows).status, 200);
    let (events, _) = shop.first_events(101);
    assert_eq!(infer(&self::request(&events)).status, 413);

    // A body that does not come, and a head that does not come.
    let begun = Instant::now();
    let slow = format!(
        "{INFER} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{{"
    );
    let answer = exchange(http, slow.as_bytes()).unwrap();
    assert_eq!(answer.status, 504, "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    // The request's own limit is shorter.
    let hurried = request.replacen('{', "{\"parameters\":{\"timeout\":1},", 1);
    assert_eq!(infer(&hurried).status, 504);

    let metrics = ask(http, "GET /metrics", "", "").body;
    for line in [
        "bireme_requests_total{model=\"gru\",outcome=\"success\"}",
        "bireme_requests_in_flight 0",
        "# EOF",
    ] {
        assert!(metrics.contains(line), "{metrics}");
    }
    assert_eq!(infer(&request).status, 200);
    assert!(server.end().success());

    // Scores of the whole catalogue for many sessions.
    let server = serve(&repository, &shop, &["--max-bodies-mib", "1"]);
    let scores = |n_events: usize| {
        let body = self::request(&shop.first_events(n_events).0);
        let body = body.replace("item_ids", "output").replace(",{\"name\":\"item_scores\"}", "");
        ask(&server.http, "POST /v2/models/gru_scores/infer", "", &body)
    };
    assert_eq!(scores(100).status, 200);
    let refused = scores(3000);
    assert_eq!(refused.status, 413, "{}", refused.head);
    assert!(refused.body.contains("ask for fewer sessions"), "{refused:?}");
    assert!(server.end().success());
}

fn packed(encoding: &str, body: &[u8]) -> Vec<u8> {
    let level = Compression::default();
    let packed = match encoding {
        "gzip" => read_all(GzEncoder::new(body, level)),
        _ => read_all(ZlibEncoder::new(body, level)),
    };
    packed.unwrap()
}

/// Posts bytes to the model.
fn post(address: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let BytesAnswer { status, head, body } = ask_bytes(address, INFER, headers, body);
    (status, head, body)
}

#[test]
fn clients_are_answered_as_by_triton() {
    let (shop, repository, request) = exported();
    let server = serve(&repository, &shop, &["--max-body-mib", "1"]);
    let http = server.http.as_str();
    let plain = ask(http, INFER, "", &request).json();

    // Compressed bodies, and compressed answers.
    for encoding in ["gzip", "deflate"] {
        let headers = format!("Content-Encoding: {encoding}\r\nAccept-Encoding: {encoding}\r\n");
        let (status, head, body) = post(http, &headers, &packed(encoding, request.as_bytes()));
        assert!(status == 200 && head.contains(&format!("content-encoding: {encoding}")), "{head}");
        let body = match encoding {
            "gzip" => read_all(GzDecoder::new(&body[..])),
            _ => read_all(ZlibDecoder::new(&body[..])),
        };
        assert_eq!(serde_json::from_slice::<Value>(&body.unwrap()).unwrap(), plain);
        // Behind the JSON in binary, whose length is that of the body decompressed.
        let headers = format!(
            "Content-Encoding: {encoding}\r\nInference-Header-Content-Length: {}\r\n",
            request.len()
        );
        let (status, _, body) = post(http, &headers, &packed(encoding, request.as_bytes()));
        assert_eq!((status, serde_json::from_slice::<Value>(&body).unwrap()), (200, plain.clone()));
        // A bomb: 64 MiB of spaces in 64 KiB.
        let (status, _, body) = post(http, &headers, &packed(encoding, &vec![b' '; 64 << 20]));
        assert_eq!(status, 413, "{}", String::from_utf8_lossy(&body));
        let half = &packed(encoding, request.as_bytes())[..40];
        for broken in [half, b"plain", request.as_bytes()] {
            let (status, _, body) = post(http, &headers, broken);
            let body = String::from_utf8_lossy(&body).into_owned();
            assert!(status == 400 && body.starts_with("{\"error\":\"the body "), "{status} {body}");
        }
    }
    for encoding in ["br", "zstd", "gzip, deflate", "\u{fc}"] {
        let (status, _, body) =
            post(http, &format!("Content-Encoding: {encoding}\r\n"), request.as_bytes());
        let body = String::from_utf8_lossy(&body).into_owned();
        assert!(
            status == 415 && body.contains("this server reads `gzip` and `deflate`"),
            "{status} {body}"
        );
    }
    let (status, ..) = post(http, "Content-Encoding: identity\r\n", request.as_bytes());
    assert_eq!(status, 200);

    // Parameters.
    let with = |parameters: &str, inputs: &str| {
        let body = request.replacen('{', &format!("{{\"parameters\":{{{parameters}}},"), 1);
        ask(http, INFER, "", &body.replacen("\"inputs\":[", &format!("\"inputs\":[{inputs}"), 1))
    };
    let top_k =
        |n: i32| format!(r#"{{"name":"top_k","datatype":"INT32","shape":[1],"data":[{n}]}},"#);
    for (parameters, inputs, n) in [
        (r#""top_k":3"#, String::new(), 3),
        ("", top_k(4), 4),
        (r#""top_k":4,"exclude_seen":true"#, top_k(4), 4),
        (r#""timeout":0"#, String::new(), 20),
        (r#""unknown":"x","of_site":1.5,"big":18446744073709551615"#, String::new(), 20),
    ] {
        let answer = with(parameters, &inputs);
        assert_eq!(answer.status, 200, "{parameters}: {answer:?}");
        assert_eq!(answer.json()["outputs"][0]["shape"], json!([1, n]), "{parameters}");
    }
    for (parameters, inputs, message) in [
        (r#""top_k":3"#, top_k(4), "`top_k` is 4 as an input and 3 as a parameter"),
        (
            r#""top_k":"3""#,
            String::new(),
            "parameter `top_k` must be a whole number, not the text `3`",
        ),
        (r#""top_k":3.5"#, String::new(), "parameter `top_k` must be a whole number, not 3.5"),
        (r#""top_k":true"#, String::new(), "parameter `top_k` must be a whole number, not true"),
        (r#""top_k":0"#, String::new(), "`top_k` is 0, and must be from 1 to 100"),
        (
            r#""exclude_seen":1"#,
            String::new(),
            "parameter `exclude_seen` must be true or false, not 1",
        ),
        (r#""timeout":-5"#, String::new(), "parameter `timeout` is -5: it is negative"),
        (r#""timeout":1.5"#, String::new(), "whole number of microseconds, not 1.5"),
        (
            r#""x":[1]"#,
            String::new(),
            "parameter `x` must be true, false, a number or a text, not a list",
        ),
    ] {
        let answer = with(parameters, &inputs);
        assert_eq!(answer.status, 400, "{parameters}: {answer:?}");
        assert!(answer.json()["error"].as_str().unwrap().contains(message), "{answer:?}");
    }

    // Shapes.
    for (shape, message) in [
        ("[-5,1]", "`event_time` has the shape [-5, 1]: dimension 0 is negative"),
        ("[5,-1]", "`event_time` has the shape [5, -1]: dimension 1 is negative"),
        ("[5]", "`event_time` must have the shape [any, 1], not [5]"),
        ("[1,5]", "`event_time` must have the shape [any, 1], not [1, 5]"),
        ("[4611686018427387904,4]", "too many elements to count"),
        ("[4,1]", "bytes after its 4 elements"),
    ] {
        let answer = ask(http, INFER, "", &request.replacen("[5,1]", shape, 1));
        assert_eq!(answer.status, 400, "{shape}: {answer:?}");
        assert!(answer.json()["error"].as_str().unwrap().contains(message), "{answer:?}");
    }
    assert!(server.end().success());
}

#[test]
fn configurations_that_triton_takes_start_the_server() {
    let (shop, repository, request) = exported();
    let append = |model: &str, more: &str| {
        let path = repository.join(model).join("config.pbtxt");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(path, text + more).unwrap();
    };
    append(
        "gru_model",
        "instance_group [ { count: 2 kind: KIND_GPU gpus: [ 0, 1 ] } ]\n\
         response_cache { enable: true }\n\
         optimization { graph { level: 1 } } # and so on\n\
         model_warmup [{ name: 'w', batch_size: 1 }]\n",
    );
    let server = serve(&repository, &shop, &[]);
    assert_eq!(ask(&server.http, INFER, "", &request).status, 200);
    assert_eq!(ask(&server.http, "POST /v2/repository/models/gru/load", "", "").status, 200);
    let log = server.log();
    let ignored = "ignored what this server does not implement: `response_cache` (line ";
    assert_eq!(log.matches(ignored).count(), 1, "{log}");
    assert!(
        log.contains("`optimization` (line ") && log.contains("`model_warmup` (line "),
        "{log}"
    );
    assert_eq!(
        log.matches("`instance_group` asks for GPUs; the model runs on the CPU").count(),
        1,
        "{log}"
    );
    append("gru_etl", "sequence_batching { }\n");
    let refused = ask(&server.http, "POST /v2/repository/models/gru/load", "", "");
    assert!(refused.status == 400 && refused.body.contains("`sequence_batching`"), "{refused:?}");
    assert!(server.end().success());
}

#[test]
fn a_log_that_cannot_be_written_ends_nothing_and_names_are_addresses() {
    let (shop, repository, request) = exported();
    let script = "exec 2>/dev/full; exec \"$0\" serve --device cpu --repository \"$1\" \
                  --http localhost:0 --grpc localhost:0 > \"$2\"";
    let addresses = shop.path("addresses");
    let mut server = std::process::Command::new("sh")
        .env("BIREME_LOG", "debug")
        .args(["-c", script, PROGRAM, repository.to_str().unwrap(), &addresses])
        .spawn()
        .unwrap();
    let begun = Instant::now();
    let http = loop {
        let text = fs::read_to_string(&addresses).unwrap_or_default();
        if let Some(http) = text
            .lines()
            .find_map(|line| line.strip_prefix("http "))
            .filter(|_| text.contains("grpc "))
        {
            break http.to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(60) && server.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(20));
    };
    for body in [request.as_str(), "{", request.as_str()] {
        let status = if body == "{" { 400 } else { 200 };
        assert_eq!(ask(&http, INFER, "", body).status, status);
    }
    let kill = format!("kill -s INT {}", server.id());
    assert!(std::process::Command::new("sh").args(["-c", &kill]).status().unwrap().success());
    assert!(server.wait().unwrap().success());
}

#[test]
fn keys_are_required_and_connections_are_limited() {
    let (shop, repository, request) = exported();
    let keys = shop.path("keys");
    fs::write(&keys, "# of the shop\nsecret one\n\nother\n").unwrap();
    let more = [
        "--api-keys",
        keys.as_str(),
        "--max-connections",
        "3",
        "--idle-seconds",
        "1",
        "--log",
        "json",
    ];
    let server = serve(&repository, &shop, &more);
    let http = server.http.as_str();
    for (key, status) in [
        ("", 401),
        ("Authorization: Bearer wrong\r\n", 401),
        ("Authorization: Bearer # of the shop\r\n", 401),
        ("Authorization: other\r\n", 401),
        ("Authorization: Bearer other\r\n", 200),
        ("Authorization: Bearer secret one\r\n", 200),
    ] {
        let answer = ask(http, INFER, key, &request);
        assert_eq!(answer.status, status, "{key}: {answer:?}");
    }
    assert_eq!(ask(http, "GET /metrics", "", "").status, 401);
    assert_eq!(ask(http, "GET /v2/health/ready", "", "").status, 200);

    // Those who take up connections lose them, and others are served again.
    let health = "GET /v2/health/live HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n";
    let silent = (0..20).find_map(|_| {
        let mut silent: Vec<TcpStream> =
            [http, http, &server.grpc].map(|address| TcpStream::connect(address).unwrap()).into();
        silent[1].write_all(b"GET /v2/health").ok()?;
        silent[2].write_all(b"PRI * HTTP").ok()?;
        thread::sleep(Duration::from_millis(100));
        let closed = exchange(http, health.as_bytes());
        // Connections of before may have taken the place of one of the three.
        (closed.is_err() || closed.is_ok_and(|answer| answer.status == 0)).then_some(silent)
    });
    let silent = silent.expect("a fourth connection is closed at once");
    let begun = Instant::now();
    while !exchange(http, health.as_bytes()).is_ok_and(|answer| answer.status == 200) {
        assert!(begun.elapsed() < Duration::from_secs(20), "silent connections are kept");
        thread::sleep(Duration::from_millis(100));
    }
    drop(silent);
    let log = server.log();
    let lines = log.lines().filter(|line| line.starts_with('{'));
    let lines: Vec<Value> = lines.map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.iter().any(|line| line["message"] == "listening"), "{log}");
    assert!(server.end().success());
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let (shop, repository, _) = exported();
    let (repository, empty) = (repository.to_str().unwrap(), shop.path("empty"));
    fs::create_dir(&empty).unwrap();
    fs::write(shop.path("no_keys"), "# none\n").unwrap();
    let (no_keys, nowhere) = (shop.path("no_keys"), shop.path("nowhere"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let any = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"];
    let start = |repository: &str, more: &[&str]| {
        shop.run(&[&["serve", "--device", "cpu", "--repository", repository], more].concat())
    };
    let refused = |finished: Finished, message: &str| finished.refused(message);
    refused(start(&nowhere, &any), "nowhere");
    refused(start(&empty, &any), "holds no model");
    refused(start(repository, &["--http", &taken, "--grpc", "127.0.0.1:0"]), &taken);
    for (address, message) in [
        ("nowhere", "`nowhere` is not an address to listen on"),
        ("127.0.0.1:99999", "`127.0.0.1:99999` is not an address"),
        ("no-such-host.invalid:0", "`no-such-host.invalid:0` is not an address"),
        ("192.0.2.1:0", "cannot listen on 192.0.2.1:0"),
    ] {
        refused(start(repository, &["--http", address, "--grpc", "127.0.0.1:0"]), message);
    }
    let port = taken.rsplit_once(':').unwrap().1;
    refused(
        start(repository, &["--grpc", &format!("localhost:{port}"), "--http", "127.0.0.1:0"]),
        &taken,
    );
    refused(start(repository, &[&any[..], &["--api-keys", &no_keys]].concat()), "no_keys");
    refused(start(repository, &[&any[..], &["--load", "other"]].concat()), "no model `other`");
    fs::write(shop.path("repository/gru/config.pbtxt"), "name: \"gru\"\nplatfrom: \"ensemble\"\n")
        .unwrap();
    refused(start(repository, &any), "platfrom");
}
