//! The day loop: trains on each day of a run and evaluates on the next.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use tch::Device;

use super::dataset::{TrainingDay, step_shape};
use super::day::{Day, LastRecord};
use super::evaluation::EvaluationTask;
use super::{Dataset, Learner, RankContext, Signals, TrainError, item_table, learner};
use crate::checkpoint::{
    CheckpointError, Checkpoints, Position, Saver, SharedCheckpoint, State, counts_other_items,
};
use crate::collective::Collective;
use crate::collective::phase_timer::PhaseTimer;
use crate::config::{Config, Reduction};
use crate::data::{DayPlan, Features, RowCheck, SessionFile, Split, occurrences};
use crate::device::memory::set_phase;
use crate::metrics::Metrics;
use crate::report::{Report, write_results};

/// How a run ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It has trained on all days.
    Done,
    /// It stopped on request, after a checkpoint at this position.
    Stopped(Position),
}

/// A run that is ready to train, new or resumed.
pub struct Training<'a> {
    config: &'a Config,
    data: &'a Dataset,
    place: RankContext<'a>,
    learner: Box<dyn Learner + 'a>,
    state: State,
    /// Occurrences of each item in training so far, on all ranks: `[V]`.
    occurrences: Vec<i64>,
    /// Position of the checkpoint that the run resumes from.
    resumed_at: Option<Position>,
    /// See [`Day::n_reported`].
    n_reported: usize,
}

/// Everything outside the model that a running training uses.
struct RunContext<'r> {
    run_dir: &'r Path,
    report: &'r mut Report,
    signals: &'r Signals,
    rows: &'r mut RowCheck,
    checkpoints: Checkpoints,
    /// On rank 0.
    saver: Option<Saver>,
}

impl RunContext<'_> {
    /// Waits until all checkpoints are written.
    fn finish_saving(&mut self) -> Result<(), CheckpointError> {
        self.saver.as_mut().map_or(Ok(()), Saver::finish)
    }
}

impl<'a> Training<'a> {
    /// Prepares a run of `config` on `data`. `from`: the checkpoint to resume from, whose catalogue
    /// may be smaller than that of `data`.
    ///
    /// # Errors
    /// The model does not fit the data, or the checkpoint does not fit the model or the data.
    pub fn new(
        config: &'a Config,
        data: &'a Dataset,
        place: RankContext<'a>,
        from: Option<SharedCheckpoint<'_>>,
    ) -> Result<Self, TrainError> {
        set_phase("setting the model up");
        let n_items = data.features.n_items();
        let item_table = item_table(config, n_items, place.collective);
        let learner = learner(config, &data.features, place, item_table)?;
        let state = State::new(config, n_items, data.fingerprints.clone());
        let occurrences = vec![0; n_items as usize];
        let mut training = Self {
            config,
            data,
            place,
            learner,
            state,
            occurrences,
            resumed_at: None,
            n_reported: 0,
        };
        if let Some(from) = from {
            training.resume(&from)?;
        }
        Ok(training)
    }

    /// *All ranks.* Loads the state of a checkpoint.
    fn resume(&mut self, from: &SharedCheckpoint<'_>) -> Result<(), TrainError> {
        let (n_items, n_counted) = (self.data.features.n_items(), from.occurrences().len());
        if n_counted as i64 > n_items {
            return Err(from.mismatch(counts_other_items(n_counted, n_items)).into());
        }
        let &State { position, n_skipped, .. } = from.state();
        let Position { day, day_steps, .. } = position;
        let Some(training_day) = self.data.days.iter().find(|other| other.day == day) else {
            let problem = format!("it is of day {day}, which the configuration does not train on");
            return Err(from.mismatch(problem).into());
        };
        let n_steps = day_plan(self.config, training_day, self.place.device).n_steps();
        if !position.is_end_of_day() && day_steps != n_steps {
            let problem =
                format!("its day {day} has {day_steps} steps, this run's day has {n_steps}");
            return Err(from.mismatch(problem).into());
        }
        self.learner.resume(from)?;
        self.occurrences[..n_counted].copy_from_slice(from.occurrences());
        // Values of another metric cannot be compared with those of this run.
        if from.state().config.checkpoint.keep_best == self.config.checkpoint.keep_best {
            self.state.evaluated.clone_from(&from.state().evaluated);
        }
        self.state.position = position;
        self.state.n_skipped = n_skipped;
        self.resumed_at = Some(position);
        Ok(())
    }

    /// *All ranks.* Trains on every day and evaluates on the next; rank 0 writes checkpoints and
    /// results.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub fn fit(
        mut self,
        run_dir: &Path,
        report: &mut Report,
        signals: &Signals,
        rows: &mut RowCheck,
    ) -> Result<Ended, TrainError> {
        let (data, root) = (self.data, self.place.collective.root());
        let checkpoints = Checkpoints::of(run_dir);
        let saver = root.map(|root| Saver::new(root, checkpoints.clone())).transpose()?;
        let mut run = RunContext { run_dir, report, signals, rows, checkpoints, saver };
        let mut last_metrics = None;
        let first_day = self.resumed_at.map(|position| position.day);
        for day in data.days.iter().filter(|day| first_day.is_none_or(|first| first <= day.day)) {
            if self.train_day(day, &mut run)?.is_break() {
                run.finish_saving()?;
                return Ok(Ended::Stopped(self.state.position));
            }
            last_metrics = Some(self.evaluate_day(day, &mut run)?);
        }
        run.finish_saving()?;
        if let (Some(root), Some(metrics)) = (root, last_metrics) {
            write_results(root, run_dir, &self.config.title(), &metrics)?;
        }
        Ok(Ended::Done)
    }

    /// *All ranks.* Trains on the remaining steps of a day, if any; breaks if a stop was requested.
    fn train_day(
        &mut self,
        day: &TrainingDay,
        run: &mut RunContext<'_>,
    ) -> Result<ControlFlow<()>, TrainError> {
        let Self { config, data, place, resumed_at, .. } = *self;
        let plan = day_plan(config, day, place.device);
        let is_first = resumed_at.is_none() && self.state.position.global_step == 0;
        set_phase(format!("training on day {}", day.day));
        match resumed_at.filter(|position| position.day == day.day) {
            // The checkpoint was written after the last step of the day and before its evaluation.
            Some(position) if position.is_end_of_day() => return Ok(ControlFlow::Continue(())),
            // The checkpoint's occurrences include this day.
            Some(_) => {}
            None => {
                add_occurrences(
                    &mut self.occurrences,
                    day.window.today(),
                    &data.features,
                    place.collective,
                )?;
                let global_step = self.state.position.global_step;
                let day_steps = plan.n_steps();
                self.state.position =
                    Position { day: day.day, day_step: 0, day_steps, global_step };
            }
        }
        let mut day = Day {
            config,
            plan,
            features: &data.features,
            catalogue: data.catalogue.as_ref(),
            pretrained: data.pretrained.as_ref(),
            is_first,
            place,
            report: &mut *run.report,
            signals: run.signals,
            rows: &mut *run.rows,
            checkpoints: &run.checkpoints,
            saver: &mut run.saver,
            occurrences: &self.occurrences,
            n_trained: 0,
            last_record: LastRecord {
                time: Instant::now(),
                day_step: self.state.position.day_step,
            },
            timer: PhaseTimer::new(
                place.device,
                config.train.time_phases,
                place.collective.watch(),
            ),
            state: &mut self.state,
            late: None,
            n_reported: &mut self.n_reported,
        };
        day.train(&mut *self.learner)
    }

    /// *All ranks.* Evaluates on the day after `day`.
    fn evaluate_day(
        &mut self,
        day: &TrainingDay,
        run: &mut RunContext<'_>,
    ) -> Result<Metrics, TrainError> {
        let Self { config, data, place, .. } = *self;
        run.rows.poll()?;
        set_phase(format!("evaluating on day {}", day.day + 1));
        let task = EvaluationTask {
            file: &day.valid,
            features: &data.features,
            occurrences: &self.occurrences,
            train_day: day.day,
            eval_day: day.day + 1,
            split: Split::Valid,
        };
        let (recommender, item_table) = (self.learner.recommender(), self.learner.item_table());
        let (record, evaluation) =
            task.evaluate(recommender, &item_table, config, place.collective)?;
        run.report.record(&record)?;
        task.save(run.run_dir, config, &evaluation, place.collective)?;
        let measured = config.checkpoint.keep_best.map(|measure| evaluation.metrics.get(measure));
        if let Some(value) = measured.filter(|value| value.is_finite()) {
            self.state.evaluated.insert(day.day, value);
        }
        Ok(evaluation.metrics)
    }
}

fn day_plan(config: &Config, day: &TrainingDay, device: Device) -> DayPlan {
    DayPlan {
        window: day.window.clone(),
        day: day.day,
        n_epochs: config.train.epochs_per_day,
        shape: step_shape(&config.train),
        seed: config.run.seed,
        order: config.train.order,
        max_steps: config.train.max_steps_per_day,
        // Gradients are summed in fixed point per micro-batch, so each needs its own backward pass.
        one_batch_each: config.run.reduction == Reduction::Reproducible,
        // A GPU would wait for the first step of an epoch. On a CPU reading takes the cores of the
        // training, and memory is the larger concern.
        reads_ahead: device != Device::Cpu,
    }
}

/// *All ranks.* Adds the occurrences of the items in a whole file to `total: [V]`.
fn add_occurrences(
    total: &mut [i64],
    file: &SessionFile,
    features: &Features,
    collective: &dyn Collective,
) -> Result<(), TrainError> {
    let mut counts = occurrences(file, features, (collective.rank(), collective.world_size()))?;
    collective.sum_i64(&mut counts)?;
    total.iter_mut().zip(counts).for_each(|(total, n)| *total += n);
    Ok(())
}
