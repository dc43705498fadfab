//! The ranks of a command: they join, agree, and end together.

use std::path::Path;
use std::time::Duration;

use bireme_base::console;
use bireme_base::message::chain;
use bireme_base::user_error::{FAILED, REFUSED, UserError};

use super::args::RunArgs;
use super::failure::{Failure, with_hint};
use crate::collective::{self, Collective, CollectiveError};
use crate::config::{Config, ConfigError, Reduction};
use crate::data::Days;
use crate::device::{self, DeviceChoice};
use crate::resume::RunRequest;
use crate::train::{Purpose, RankContext, TrainError, check_memory};

/// The ranks of a command, where this one computes, and what all run.
pub(super) struct Job<C = Config> {
    pub collective: Box<dyn Collective>,
    pub place: device::Place,
    pub config: C,
}

/// What a rank computes on.
struct Wanted {
    /// Longest time of a collective call; `None` for the default.
    patience: Option<Duration>,
    device: DeviceChoice,
    /// 0: this rank's part of the host's cores.
    n_threads: usize,
}

impl<C> Job<C> {
    /// *All ranks.* Joins the job that this process was started into.
    fn join<E: UserError>(
        choose: impl FnOnce() -> Result<(Wanted, C), E>,
    ) -> Result<Self, Failure> {
        device::memory::keep_freed_memory();
        let host = collective::join().map_err(Failure::refused)?;
        // Before `agree`, which makes tensors: libtorch looks for GPUs at the first tensor.
        let (local_rank, local_size) = (host.local_rank(), host.local_size());
        let chosen = choose().map(|(Wanted { patience, device, n_threads }, config)| {
            (patience, device::place(device, n_threads, local_rank, local_size), config)
        });
        let (patience, place, config) = agree(&*host, chosen)?;
        let place = agree(&*host, place)?;
        // Before NCCL, which waits for all ranks.
        if let (Some(patience), Some(watch)) = (patience, host.watch()) {
            watch.set_limit(patience);
        }
        let collective = collective::on_device(host, &place).map_err(Failure::refused)?;
        Ok(Self { collective, place, config })
    }

    /// *All ranks.* Agrees on the results of a step that each rank prepared alone. If one rank
    /// failed, all are refused, and rank 0 reports the error.
    pub fn agree<T>(&self, prepared: Result<T, impl UserError>) -> Result<T, Failure> {
        agree(&*self.collective, prepared)
    }
}

fn agree<T>(
    collective: &dyn Collective,
    prepared: Result<T, impl UserError>,
) -> Result<T, Failure> {
    let hint = prepared.as_ref().err().and_then(UserError::hint);
    collective.agree(prepared).map_err(|error| {
        let message = collective.root().map(|_| with_hint(chain(&error), hint));
        Failure { exit_code: REFUSED, message }
    })
}

impl Job<()> {
    /// *All ranks.* Joins a job without a configuration.
    pub fn without_config(device: DeviceChoice) -> Result<Self, Failure> {
        let wanted = Wanted { patience: None, device, n_threads: 0 };
        Self::join(|| Ok::<_, ConfigError>((wanted, ())))
    }
}

impl Job {
    /// *All ranks.* Joins a job whose configuration says what it computes on.
    pub fn with_config(
        load: impl FnOnce() -> Result<Config, ConfigError>,
    ) -> Result<Self, Failure> {
        let job = Self::join(|| {
            let config = load()?;
            config.check_threads(device::n_cores())?;
            let run = &config.run;
            let patience = Some(Duration::from_secs_f64(run.patience_seconds));
            let wanted = Wanted { patience, device: run.device, n_threads: run.threads_per_rank };
            Ok::<_, ConfigError>((wanted, config))
        })?;
        let run = &job.config.run;
        if job.place.device.is_cuda() {
            let is_deterministic = run.reduction == Reduction::Reproducible;
            job.agree(device::tune(is_deterministic, run.precision))?;
        }
        Ok(job)
    }

    pub fn context(&self) -> RankContext<'_> {
        RankContext { collective: &*self.collective, device: self.place.device }
    }

    /// The run of a command.
    pub fn request<'a>(&'a self, args: &'a RunArgs, run_dir: &'a Path) -> RunRequest<'a> {
        RunRequest {
            run_dir,
            config_file: &args.config,
            data_dir: &args.data,
            overwrite: args.overwrite,
            config: &self.config,
            collective: &*self.collective,
            place: &self.place,
        }
    }

    /// *All ranks.* Refuses a model that does not fit into memory without its optimizer.
    pub fn check_memory_to_read(&self, data: &Path) -> Result<(), Failure> {
        let days = self.agree(Days::open(data, &self.config.data))?;
        let context = self.context();
        self.agree(check_memory(&self.config, days.features(), context, Purpose::Read, None))
    }

    /// Ends the command as the work of all ranks ended on this one. An error that only this rank
    /// has ends the whole job at once, as the others may wait for this rank forever.
    pub fn end<T>(&self, worked: Result<T, TrainError>) -> Result<T, Failure> {
        let error = match worked {
            Ok(done) => return Ok(done),
            Err(error) => error,
        };
        let is_on_all = matches!(
            &error,
            TrainError::NotFinite { .. }
                | TrainError::GraphRequired(_)
                | TrainError::Desync { .. }
                | TrainError::Collective(CollectiveError::Rank { .. })
        );
        let text = chain(&error);
        let (rank, world_size) = (self.collective.rank(), self.collective.world_size());
        if is_on_all || world_size == 1 {
            let message = self.collective.root().map(|_| text);
            return Err(Failure { exit_code: FAILED, message });
        }
        let host = collective::host_name();
        let watch = self.collective.watch();
        let at = watch.map_or(String::new(), |watch| format!(", {}", watch.progress()));
        console::error(&format!("{text}: rank {rank} of {world_size} on {host}{at}"));
        self.collective.abort(FAILED)
    }
}
