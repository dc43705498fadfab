//! Names of the files of a run directory, and of its checkpoints.
//!
//! One process at a time writes to it ([`LOCK`]).

/// Configuration as resolved. Written last at the start: a folder without it holds no run.
pub const CONFIG: &str = "config.toml";

/// Version, command and machine of each start.
pub const RUN: &str = "run.json";

/// Records, one JSON object per line; see [`crate::run_log`].
pub const METRICS: &str = "metrics.jsonl";

/// Metrics of the last evaluation, as text; also a file of a report.
pub const RESULTS: &str = "results.txt";

/// Folder of one file per saved evaluation; see [`crate::report::evaluation_file`].
pub const EVALUATIONS: &str = "evaluations";

/// Folder of the checkpoints.
pub const CHECKPOINTS: &str = "checkpoints";

/// Folder of what serving needs of the data: the schema and the workflow.
pub const DATA: &str = "etl";

/// [`DATA`] while it is written.
pub const DATA_ASIDE: &str = ".data.partial";

/// Locked by the process that writes to the run directory.
pub const LOCK: &str = ".lock";

/// File of a checkpoint: the weights of the model.
pub const WEIGHTS: &str = "weights.safetensors";

/// File of a checkpoint: the state of the optimizer.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// File of a checkpoint: occurrences of each item in training so far.
pub const OCCURRENCES: &str = "occurrences.safetensors";

/// File of a checkpoint: everything that is not a tensor.
pub const STATE: &str = "state.json";

/// File of a checkpoint, written last: size and hash of each of the others.
pub const MANIFEST: &str = "manifest.json";
