//! What stands around the trainer: works on plain data and files, without libtorch and MPI.
//!
//! | module | purpose |
//! | --- | --- |
//! | [`synth`] | synthetic events, and the Recall@20 that can be reached on them |
//! | [`run_dir`], [`run_log`] | file names of a run directory, its `metrics.jsonl` |
//! | [`measure`] | ranking metrics from the ranks of held-out items |
//! | [`report`] | saved evaluations, and finished runs compared in tables, charts and pages |
//! | [`findings`] | what `bireme doctor` finds |
//! | [`launch`] | starts commands on several ranks |
//! | [`scaling`] | measured scaling, and predictions for other jobs |
//! | [`sink`], [`columns`] | compressed files, parquet columns |
//! | [`table`], [`shell`] | tables of text, quoted commands |

// Most fields and variants are explained by their names.
#![allow(missing_docs)]

pub mod synth;
pub mod run_dir;
pub mod run_log;
pub mod measure;
pub mod report;
pub mod findings;
pub mod launch;
pub mod scaling;
pub mod sink;
pub mod columns;
pub mod table;
pub mod shell;
