//! Bireme trains session-based recommenders on many GPUs: it reads raw shop events and outputs a
//! served next-item model and its metrics over the whole catalogue. MPI starts the ranks, NCCL
//! moves their tensors.
//!
//! The modules, in the order in which data meets them:
//!
//! | module | from | to |
//! | --- | --- | --- |
//! | [`env`](mod@env) | the environment | names of variables |
//! | [`etl`] | events | sessions in one folder for each day, a workflow, a schema |
//! | [`config`] | a TOML file and `--set` | a run as resolved |
//! | [`device`], [`collective`] | the launcher's environment | ranks and their reductions |
//! | [`data`] | day partitions | batches of sessions, the same for any number of ranks |
//! | [`model`] | batches | scores over the catalogue, a summed loss, gradients |
//! | [`optim`] | summed gradients | new parameters |
//! | [`metrics`] | scores | NDCG@K, Recall@K, MRR@K, the outcome of each session |
//! | [`checkpoint`] | a run's state | a folder to resume from, on any number of ranks |
//! | [`report`] | records, outcomes | `metrics.jsonl`, `results.txt`, `evaluations/`, log lines |
//! | [`train`] | all of the above | the day loop: train on day t, evaluate on day t + 1 |
//! | [`export`] | a checkpoint, the workflow | a model repository to serve |
//! | [`recommend`] | a model repository, events | recommendations with brand, category and price |
//! | `resume` | a run directory, a configuration | a run to start, to resume or to refuse |
//! | [`doctor`] | a job as it was started | measurements of its environment, suggested fixes |
//! | `scaling` | a configuration, numbers of ranks | step times, measured and predicted |
//! | [`cli`] | arguments | an exit code |
//!
//! The package [`bireme_kernels`] holds the loops over the memory of tensors. The package
//! [`bireme_tools`] holds what needs neither ranks nor tensors: the synthetic shop, reports of
//! finished runs, predictions of scaling.
//!
//! Nothing outside `collective` knows which backend runs, and only `report` and
//! [`bireme_base::console`] print.
//!
//! # Example
//!
//! Recommend for the sessions of a file with an exported model:
//!
//! ```no_run
//! use bireme::etl::BadRows;
//! use bireme::recommend::{RecommendError, RecommendOptions, recommend};
//!
//! # fn main() -> Result<(), RecommendError> {
//! let options = RecommendOptions {
//!     repository: "repository".into(),
//!     name: "shop".to_owned(),
//!     events: vec!["events.csv".into()],
//!     bad_rows: BadRows::Refuse,
//!     first: 50,
//!     top: 5,
//!     exclude_seen: false,
//!     device: tch::Device::Cpu,
//! };
//! recommend(&options, |session| {
//!     for item in &session.recommended {
//!         println!("{} {} {:.2}", session.session, item.product.product_id, item.score);
//!     }
//!     Ok(())
//! })?;
//! # Ok(())
//! # }
//! ```
//!
//! # Shapes
//!
//! | letter | counts |
//! | --- | --- |
//! | B | sessions of a batch |
//! | L | positions of the longest session in it |
//! | D | width of a vector |
//! | N | targets |
//! | V | rows of the item table: the catalogue, with 0 for padding and 1 for unknown |
//! | C | items of a chunk of the catalogue |
//! | K | cutoff of a ranking metric |
//!
//! # Exit codes
//!
//! 0 done; 1 the run failed; 2 refused before starting; 3 stopped on request after a checkpoint.

pub mod env;
pub use bireme_etl as etl;
pub mod config;
pub mod device;
pub mod collective;
pub mod data;
pub mod model;
pub mod optim;
pub mod metrics;
pub mod checkpoint;
pub mod report;
pub mod train;
pub mod export;
pub mod recommend;
pub mod doctor;
mod resume;
mod scaling;
pub mod cli;
