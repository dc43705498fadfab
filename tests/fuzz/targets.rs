//! Fuzz targets: any bytes are answered or refused, without a panic, an endless loop or unbounded
//! memory.
//!
//! `tests/fuzz/run.sh request 600` fuzzes a target. `corpus.tar.gz` holds at most 15
//! seeds a target, which `tests/it/fuzz.rs` runs again.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

use bireme_etl::serving::{INPUTS, ModelColumn, Preprocessor, ServingSettings};
use bireme_etl::{
    BadRows, PreprocessOptions, Schema, WORKFLOW, Workflow, first_events, preprocess,
};
use bireme_protocol::TensorView;
use bireme_serve::model_config::{ParsedConfig, from_text, to_text};
use bireme_serve::protocol::{ModelConfig, ModelInferRequest, ModelInput};
use bireme_serve::request::InferRequest;
use bireme_serve::{grpc, json};
use prost::Message;
use tempfile::TempDir;

/// Three days of a shop with three products.
const EVENTS: &str = "\
event_time,event_type,product_id,category_id,category_code,brand,price,user_id,user_session
2019-10-01 00:00:00 UTC,view,1003461,2053013555631882655,phones,xiaomi,489.07,52,aa
2019-10-01 00:00:05 UTC,cart,1003462,2053013555631882655,,,1.5,520088904,aa
2019-10-01 12:00:00 UTC,view,1003461,2053013555631882655,phones,xiaomi,489.07,,bb
2019-10-02 00:00:00 UTC,purchase,5000088,2053013566100866035,sewing,janome,293.65,53,bb
2019-10-02 00:00:09 UTC,view,1003462,2053013555631882655,,,1.5,520088904,cc
2019-10-03 00:00:00 UTC,view,1003461,2053013555631882655,phones,xiaomi,489.07,52,cc
";

/// The folder of a fitted workflow.
static SHOP: LazyLock<TempDir> = LazyLock::new(|| {
    let dir = scratch();
    let events = dir.path().join("events.csv");
    fs::write(&events, EVENTS).expect("events are written");
    let options = PreprocessOptions::new(vec![events], dir.path().join("out"));
    preprocess(&options, &mut |_| {}).expect("these events are in order");
    dir
});

static PREPROCESSOR: LazyLock<Preprocessor> = LazyLock::new(|| {
    let workflow =
        Workflow::load(&SHOP.path().join("out").join(WORKFLOW)).expect("it has just been written");
    let columns = [("product_id-list_seq", true), ("price_log_norm-list_seq", false)];
    let columns =
        columns.map(|(name, is_categorical)| ModelColumn::new(name, is_categorical)).into();
    let settings = ServingSettings {
        max_length: 20,
        columns,
        top_k: 20,
        max_top_k: 100,
        max_sessions: 64,
        n_recommendable: None,
    };
    Preprocessor::new(workflow, settings)
});

/// The configuration that requests are checked against.
static CONFIG: LazyLock<ModelConfig> = LazyLock::new(|| {
    let input = INPUTS.iter().map(|of| ModelInput {
        name: of.name.into(),
        data_type: of.datatype.number(),
        dims: of.dims.into(),
        optional: of.optional,
        ..ModelInput::default()
    });
    ModelConfig { input: input.collect(), ..ModelConfig::default() }
});

/// In memory where possible, because thousands of files are written per second.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    dir.expect("a temporary folder")
}

/// A request over HTTP (with the length of its JSON before it) or gRPC, up to the model's inputs.
pub fn request(bytes: &[u8]) {
    let read = match bytes {
        [0, rest @ ..] => json::read(rest, None).map(|asked| asked.request),
        [1, length, rest @ ..] => {
            // In steps of 16, so that a byte reaches far enough.
            let length = (usize::from(*length) * 16).min(rest.len());
            json::read(rest, Some(&length.to_string())).map(|asked| asked.request)
        }
        [_, rest @ ..] => match ModelInferRequest::decode(rest) {
            Ok(message) => grpc::read(message).map(|(request, _)| request),
            Err(_) => return,
        },
        [] => return,
    };
    let Ok(request) = read else { return };
    if request.check(&CONFIG, 4096).is_ok() {
        serve(&PREPROCESSOR, &request);
    }
}

fn serve(preprocessor: &Preprocessor, request: &InferRequest) {
    let views: Vec<TensorView<'_>> = request.inputs.iter().map(|tensor| tensor.view()).collect();
    if let Ok(outputs) = preprocessor.apply(&views, &request.parameters) {
        for output in outputs {
            output.view().check().expect("an output is whole");
        }
    }
}

/// Protobuf text of a schema or a model's configuration. What was read must survive being written
/// and read again.
pub fn schema(bytes: &[u8]) {
    let dir = scratch();
    let path = dir.path().join("schema.pbtxt");
    fs::write(&path, bytes).expect("a file is written");
    if let Ok(schema) = Schema::read(&path) {
        schema.write(&path).expect("a file is written");
        let again = Schema::read(&path).expect("a schema that was written is read");
        assert_eq!(again.to_string(), schema.to_string());
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(ParsedConfig { config, .. }) = from_text(text)
    {
        let again = from_text(&to_text(&config)).expect("it was written").config;
        assert_eq!(to_text(&again), to_text(&config));
    }
}

/// A workflow with one file replaced; the first byte chooses the file.
pub fn workflow(bytes: &[u8]) {
    let Some((number, bytes)) = bytes.split_first() else { return };
    let dir = scratch();
    let mut files = Vec::new();
    copy(&SHOP.path().join("out").join(WORKFLOW), dir.path(), &mut files);
    files.sort();
    fs::write(&files[usize::from(*number) % files.len()], bytes).expect("a file is written");
    let Ok(workflow) = Workflow::load(dir.path()) else { return };
    let settings = PREPROCESSOR.settings().clone();
    let events = dir.path().join("events.csv");
    fs::write(&events, EVENTS).expect("events are written");
    let (events, _) =
        first_events(&[events], 10, BadRows::Refuse).expect("these events are in order");
    let inputs = bireme_etl::serving::request(&events, 5, true);
    serve(
        &Preprocessor::new(workflow, settings),
        &InferRequest { inputs, ..InferRequest::default() },
    );
}

fn copy(from: &Path, to: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(from).expect("a folder is read") {
        let entry = entry.expect("a folder is read");
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            fs::create_dir(&to).expect("a folder is made");
            copy(&entry.path(), &to, files);
        } else {
            fs::copy(entry.path(), &to).expect("a file is copied");
            files.push(to);
        }
    }
}

/// A file of events, read by `first_events` and by `preprocess`.
pub fn events(bytes: &[u8]) {
    let dir = scratch();
    let path = dir.path().join("events.csv");
    fs::write(&path, bytes).expect("a file is written");
    let refused = first_events(std::slice::from_ref(&path), 4, BadRows::Refuse).is_err();
    if first_events(std::slice::from_ref(&path), 4, BadRows::Skip).is_ok() {
        let mut options = PreprocessOptions::new(vec![path], dir.path().join("out"));
        options.bad_rows = if refused { BadRows::Skip } else { BadRows::Refuse };
        options.n_buckets = Some(2);
        if preprocess(&options, &mut |_| {}).is_ok() {
            Workflow::load(&options.out.join(WORKFLOW))
                .expect("a workflow that was written is read");
        } else {
            assert!(!options.out.exists(), "what failed leaves nothing behind");
        }
    }
}
