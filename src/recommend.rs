//! Recommendations of an exported model for the sessions of a file, with brand, category and price.

mod write;

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bireme_base::output::OutputError;
use bireme_base::user_error::{FAILED, REFUSED, UserError};
use bireme_protocol::Tensor;
use bireme_serve::RequestError;
use bireme_serve::repository::{Compute, Repository, RepositoryError};
use bireme_serve::request::InferRequest;
use bireme_serve::statistics::Metrics;
use bireme_tools::sink::Sink;
use serde::Serialize;
use tch::Device;

use crate::etl::serving::{self, Preprocessor, SESSION};
use crate::etl::{self, BadRows, ProductInWords, RawEvent, RowCounts, Workflow};
use crate::export::{FALLBACK, ITEM_IDS, ITEM_SCORES, ModelNames, N_ITEMS};

pub use write::{RecommendationFormat, RecommendationWriter};

/// What to recommend, and for which sessions.
#[derive(Clone, Debug)]
pub struct RecommendOptions {
    /// The model repository.
    pub repository: PathBuf,
    /// The model's name.
    pub name: String,
    /// Files of events.
    pub events: Vec<PathBuf>,
    /// What to do with invalid rows.
    pub bad_rows: BadRows,
    /// Use only the first events by time.
    pub first: usize,
    /// Recommendations per session.
    pub top: usize,
    /// Leave out the items of the session.
    pub exclude_seen: bool,
    /// Device of the network.
    pub device: Device,
}

/// A session and its recommendations.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Session<'a> {
    /// Its id.
    pub session: &'a str,
    /// Whether no item of it is known, so that the most popular items are recommended.
    pub fallback: bool,
    /// Its events, by time.
    pub seen: Vec<ProductInWords<'a>>,
    /// By descending score.
    pub recommended: Vec<Recommendation<'a>>,
}

/// A recommended product.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recommendation<'a> {
    /// As described by its latest event.
    #[serde(flatten)]
    pub product: ProductInWords<'a>,
    /// A logit.
    pub score: f32,
}

/// Why there are no recommendations.
#[derive(Debug, thiserror::Error)]
pub enum RecommendError {
    /// The repository or the model.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The events or the workflow.
    #[error(transparent)]
    Etl(#[from] etl::Error),
    /// The model refuses the events, or was not exported by Bireme.
    #[error("model `{model}`: {fault}")]
    Model {
        /// The model's name.
        model: String,
        /// What it says.
        fault: RequestError,
    },
    /// No session is long enough.
    #[error("the first {n_events} events hold no session of more than one event: raise `--first`")]
    NoSession {
        /// Events read.
        n_events: usize,
    },
    /// The output cannot be created.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// A write failed.
    #[error("cannot write `{path}`")]
    Write {
        /// The output.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

impl UserError for RecommendError {
    fn exit_code(&self) -> i32 {
        match self {
            Self::Output(error) => error.exit_code(),
            Self::Write { .. } => FAILED,
            _ => REFUSED,
        }
    }
}

/// Writes recommendations to a file, which appears under its name when it is complete. Returns the
/// numbers of rows read, or none where the reader closed the standard output. `note` reports files
/// removed after an interrupted command.
///
/// # Errors
/// See [`RecommendError`].
pub fn to_file(
    options: &RecommendOptions,
    format: RecommendationFormat,
    path: &Path,
    note: &mut dyn FnMut(&str),
) -> Result<Option<RowCounts>, RecommendError> {
    etl::check_output(&options.events, path)?;
    let mut sink = Sink::create(path, note)?;
    let is_stdout = sink.is_stdout();
    let written = write(options, format, &mut sink, path);
    if let Some(counts) = unless_closed(written, is_stdout)? {
        sink.publish()?;
        return Ok(Some(counts));
    }
    Ok(None)
}

/// Writes recommendations to the standard output. Returns the numbers of rows read, or none where
/// the reader closed it.
///
/// # Errors
/// See [`RecommendError`].
pub fn to_terminal(
    options: &RecommendOptions,
    format: RecommendationFormat,
) -> Result<Option<RowCounts>, RecommendError> {
    unless_closed(write(options, format, io::stdout(), Path::new("the standard output")), true)
}

fn write(
    options: &RecommendOptions,
    format: RecommendationFormat,
    out: impl io::Write + Send,
    path: &Path,
) -> Result<RowCounts, RecommendError> {
    let at = |source| RecommendError::Write { path: path.to_owned(), source };
    let mut writer = RecommendationWriter::new(format, BufWriter::new(out)).map_err(at)?;
    let counts = recommend(options, |session| writer.write(session).map_err(at))?;
    writer.finish().map_err(at)?;
    Ok(counts)
}

fn unless_closed<T>(
    written: Result<T, RecommendError>,
    is_stdout: bool,
) -> Result<Option<T>, RecommendError> {
    match written {
        Err(RecommendError::Write { source, .. })
            if is_stdout && source.kind() == io::ErrorKind::BrokenPipe =>
        {
            Ok(None)
        }
        written => written.map(Some),
    }
}

/// Most events of a request, unless a single session has more.
const MAX_REQUEST_EVENTS: usize = 4096;

/// Passes the recommendations of every session of more than one event to `each`, in the order of
/// their first events. Returns the numbers of rows read.
///
/// # Errors
/// See [`RecommendError`].
pub fn recommend(
    options: &RecommendOptions,
    mut each: impl FnMut(&Session<'_>) -> Result<(), RecommendError>,
) -> Result<RowCounts, RecommendError> {
    let RecommendOptions { name, device, .. } = options;
    etl::check_distinct(&options.events)?;
    let of_model = |fault| RecommendError::Model { model: name.clone(), fault };
    let compute = Compute { device: *device, n_threads: 1 };
    let repository = Repository::open(&options.repository, compute, Arc::new(Metrics::default()))?;
    repository.load(name)?;
    let model = repository.model(name, "").map_err(of_model)?;
    let etl = model.parts().find(|part| part.config.name == ModelNames::new(name).etl);
    let etl = etl
        .ok_or_else(|| of_model(RequestError::invalid("it was not written by `bireme export`")))?;
    let dir = options.repository.join(&etl.config.name).join(etl.version.to_string());
    let etl = Preprocessor::load(&dir)?;
    if !model.config.output.iter().any(|output| output.name == N_ITEMS) {
        let problem = "it was exported by an older version, without `n_items`: export it again";
        return Err(of_model(RequestError::invalid(problem)));
    }

    let (events, counts) = etl::first_events(&options.events, options.first, options.bad_rows)?;
    let mut found = false;
    for sessions in chunks(&events, etl.settings().max_sessions) {
        found = true;
        let rows: Vec<RawEvent> =
            sessions.iter().flat_map(|events| events.iter().copied().cloned()).collect();
        let inputs = serving::request(&rows, options.top as i32, options.exclude_seen);
        let outputs = [SESSION, ITEM_IDS, ITEM_SCORES, FALLBACK, N_ITEMS].map(str::to_owned);
        let request = InferRequest { inputs, outputs: outputs.into(), ..InferRequest::default() };
        let outputs = model.infer_and_wait(request).map_err(of_model)?;
        let answers =
            Answers::read(&outputs).map_err(|problem| of_model(RequestError::invalid(problem)))?;
        let by_session: HashMap<&str, &Vec<&RawEvent>> =
            sessions.iter().map(|events| (events[0].session.as_str(), events)).collect();
        for row in 0..answers.sessions.len() {
            each(&answers.session(row, &by_session, etl.workflow()))?;
        }
    }
    if found { Ok(counts) } else { Err(RecommendError::NoSession { n_events: events.len() }) }
}

/// Sessions of more than one event, grouped into requests.
fn chunks(events: &[RawEvent], max_sessions: usize) -> Vec<Vec<Vec<&RawEvent>>> {
    let mut order = BTreeMap::new();
    let mut places: HashMap<&str, usize> = HashMap::new();
    for event in events {
        let next = places.len();
        let place = *places.entry(&event.session).or_insert(next);
        order.entry(place).or_insert_with(Vec::new).push(event);
    }
    let mut chunks: Vec<Vec<Vec<&RawEvent>>> = Vec::new();
    let mut n_rows = 0;
    for session in order.into_values().filter(|session: &Vec<&RawEvent>| session.len() > 1) {
        n_rows += session.len();
        match chunks.last_mut() {
            Some(chunk) if n_rows <= MAX_REQUEST_EVENTS && chunk.len() < max_sessions => {
                chunk.push(session)
            }
            _ => {
                n_rows = session.len();
                chunks.push(vec![session]);
            }
        }
    }
    chunks
}

/// Outputs of the model for a request, by row.
struct Answers<'a> {
    sessions: Vec<&'a str>,
    ids: Vec<i64>,
    scores: Vec<f32>,
    fallback: Vec<bool>,
    n_items: Vec<i32>,
}

impl<'a> Answers<'a> {
    fn read(outputs: &'a [Tensor]) -> Result<Self, String> {
        let [sessions, ids, scores, fallback, n_items] = outputs else {
            return Err("outputs are missing".to_owned());
        };
        Ok(Self {
            sessions: sessions.view().texts()?,
            ids: ids.view().i64s()?,
            scores: scores.view().f32s()?,
            fallback: fallback.view().bools()?,
            n_items: n_items.view().i32s()?,
        })
    }

    fn session(
        &self,
        row: usize,
        events: &HashMap<&str, &Vec<&'a RawEvent>>,
        workflow: &'a Workflow,
    ) -> Session<'a> {
        let session = self.sessions[row];
        let seen = events.get(session).into_iter().flat_map(|events| events.iter()).map(|event| {
            ProductInWords {
                product_id: event.product_id,
                category_code: event.category_code.as_deref(),
                brand: event.brand.as_deref(),
                price: event.price,
            }
        });
        let top_k = self.ids.len() / self.sessions.len();
        let n_items = usize::try_from(self.n_items[row]).unwrap_or(0).min(top_k);
        let places = row * top_k..row * top_k + n_items;
        let products = self.ids[places.clone()].iter().map(|&id| workflow.product(id));
        let recommended = products.zip(&self.scores[places]);
        let recommended = recommended
            .filter_map(|(product, &score)| Some(Recommendation { product: product?, score }));
        Session {
            session,
            fallback: self.fallback[row],
            seen: seen.collect(),
            recommended: recommended.collect(),
        }
    }
}
