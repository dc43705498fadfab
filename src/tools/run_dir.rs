//! Names of the files of a run directory.

/// Configuration as resolved.
pub const CONFIG: &str = "config.toml";

/// Version, command and machine of the run.
pub const RUN: &str = "run.json";

/// Records, one JSON object per line; see [`crate::run_log`].
pub const METRICS: &str = "metrics.jsonl";

/// Metrics of the last evaluation, as text; also a file of a report.
pub const RESULTS: &str = "results.txt";

/// Folder of one file per saved evaluation; see [`crate::report::evaluation_file`].
pub const EVALUATIONS: &str = "evaluations";

/// Locked by the process that writes to the run directory.
pub const LOCK: &str = ".lock";
