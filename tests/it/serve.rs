//! `bireme serve` under clients that are many, slow, wrong or unknown, and under operators.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::export::{Event, MODELS, Shop};
use crate::serving::Server;

/// An answer over HTTP.
#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Sends bytes as they are and reads until the server closes.
fn exchange(address: &str, bytes: &[u8]) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    // Slowly, for a refusal to come before all is sent.
    for piece in bytes.chunks(1 << 16) {
        stream.write_all(piece)?;
        thread::sleep(Duration::from_millis(2 * (piece.len() >> 16) as u64));
    }
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text).into_owned();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    Ok(Answer { status, head: head.to_lowercase(), body: body.to_owned() })
}

fn ask(address: &str, what: &str, headers: &str, body: &str) -> Answer {
    let length = body.len();
    let text = format!(
        "{what} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    );
    exchange(address, text.as_bytes()).unwrap()
}

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
    json!({ "inputs": inputs, "outputs": [{ "name": "item_ids" }, { "name": "item_scores" }] }).to_string()
}

const INFER: &str = "POST /v2/models/gru/infer";

/// A shop with an exported model, and a request to it.
fn exported() -> (Shop, PathBuf, String) {
    let shop = Shop::small();
    shop.train("gru", MODELS[0].1);
    shop.export_with("gru", &["--python-backend"]).success();
    let (events, _) = shop.first_events(5);
    let (repository, request) = (PathBuf::from(shop.path("repository")), request(&events));
    (shop, repository, request)
}

fn serve(repository: &Path, shop: &Shop, more: &[&str]) -> Server {
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
        shop.export_with("gru", &["--python-backend"]).success();
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
    let mut streams: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(&server.http).unwrap()).collect();
    let head = format!("{INFER} HTTP/1.1\r\nHost: test\r\nContent-Length: {}\r\n\r\n", request.len());
    let (first, rest) = request.split_at(request.len() / 2);
    for stream in &mut streams {
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(first.as_bytes())).unwrap();
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
fn what_a_client_may_cost_is_bounded() {
    let (shop, repository, request) = exported();
    let more = ["--max-requests", "2", "--max-body-mib", "1", "--max-rows", "100", "--timeout-ms", "5000"];
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
    assert!(n_refused > 0 && n_answered > 0 && n_refused + n_answered == 240, "{n_refused} {n_answered}");
    for answer in statuses.iter().filter(|answer| answer.status == 503) {
        assert!(answer.head.contains("retry-after: 1"), "{answer:?}");
    }

    let faults: [(&str, &str, &str, u16, &str); 9] = [
        (INFER, "", "", 400, "not what it should be"),
        (INFER, "", "{\"inputs\":[]}", 400, "input `event_time` is missing"),
        (INFER, "Inference-Header-Content-Length: 7\r\n", "{}", 400, "has 2 bytes"),
        ("POST /v2/models/other/infer", "", &request, 404, "no model `other`"),
        ("POST /v2/models/gru/versions/7/infer", "", &request, 404, "version 7"),
        ("POST /v2/models/gru/versions/x/infer", "", &request, 400, "`x`"),
        ("GET /v2/nothing", "", "", 404, "no such page"),
        ("POST /v2/repository/models/..%2Fgru/load", "", "", 400, "no model `../gru`"),
        ("POST /v2/repository/models/gru/load", "", "{\"parameters\":{\"config\":\"{}\"}}", 400, "`config`"),
    ];
    for (what, headers, body, status, message) in faults {
        let answer = ask(http, what, headers, body);
        assert_eq!(answer.status, status, "{what}: {answer:?}");
        assert!(answer.json()["error"].as_str().unwrap().contains(message), "{answer:?}");
    }
    let long = infer(&" ".repeat(2 << 20));
    assert_eq!(long.status, 413, "{long:?}");
    // Nor is more waited for than comes.
    let head =
        format!("{INFER} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 1900000\r\n\r\n");
    let half_sent = exchange(http, &[head.as_bytes(), &[b' '; 1_500_000]].concat()).unwrap();
    assert_eq!(half_sent.status, 413, "{half_sent:?}");
    let rows = request.replace("[5,1]", "[101,1]");
    assert_ne!(infer(&rows).status, 200);
    let (events, _) = shop.first_events(101);
    assert_eq!(infer(&self::request(&events)).status, 413);

    // A body that does not come, and a head that does not come.
    let begun = Instant::now();
    let slow =
        format!("{INFER} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: 100\r\n\r\n{{");
    let answer = exchange(http, slow.as_bytes()).unwrap();
    assert_eq!(answer.status, 504, "{answer:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    // The request's own limit is shorter.
    let hurried = request.replacen('{', "{\"parameters\":{\"timeout\":1},", 1);
    assert_eq!(infer(&hurried).status, 504);

    let metrics = ask(http, "GET /metrics", "", "").body;
    for line in
        ["bireme_requests_total{model=\"gru\",outcome=\"success\"}", "bireme_requests_in_flight 0", "# EOF"]
    {
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

#[test]
fn keys_are_asked_for_and_connections_are_counted() {
    let (shop, repository, request) = exported();
    let keys = shop.path("keys");
    fs::write(&keys, "# of the shop\nsecret one\n\nother\n").unwrap();
    let more =
        ["--api-keys", keys.as_str(), "--max-connections", "3", "--idle-seconds", "1", "--log", "json"];
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
    let refused = |finished: crate::mpirun::Finished, message: &str| {
        assert_eq!(finished.code, Some(2), "{finished:#?}");
        assert!(finished.stderr.contains(message), "{finished:#?}");
    };
    refused(start(&nowhere, &any), "nowhere");
    refused(start(&empty, &any), "holds no model");
    refused(start(repository, &["--http", &taken, "--grpc", "127.0.0.1:0"]), &taken);
    refused(start(repository, &[&any[..], &["--api-keys", &no_keys]].concat()), "no_keys");
    refused(start(repository, &[&any[..], &["--load", "other"]].concat()), "no model `other`");
    fs::write(shop.path("repository/gru/config.pbtxt"), "name: \"gru\"\nplatfrom: \"ensemble\"\n").unwrap();
    refused(start(repository, &any), "platfrom");
}
