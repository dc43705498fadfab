//! A run from its first day, or from where an earlier part of it ended, to its last.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use super::dataset::step_shape;
use super::day::Day;
use super::evaluation::EvaluationTask;
use super::{Dataset, Learner, RankContext, Signals, TrainError, item_table, learner};
use crate::checkpoint::{Checkpoints, Position, Saver, SharedCheckpoint, State, counts_other_items};
use crate::collective::Collective;
use crate::collective::phase_timer::PhaseTimer;
use crate::config::{Config, Reduction};
use crate::data::{DayPlan, Features, RowCheck, SessionFile, Split, Window, occurrences};
use crate::device::memory::set_phase;
use crate::report::{Report, write_results};

/// How a run ended that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It has trained on all days.
    Done,
    /// It was asked to stop, and a checkpoint holds all it had done.
    Stopped(Position),
}

/// A run that is ready to go: at its beginning, or where an earlier part of it left off.
pub struct Training<'a> {
    config: &'a Config,
    data: &'a Dataset,
    place: RankContext<'a>,
    learner: Box<dyn Learner + 'a>,
    state: State,
    /// How often each item occurred in training so far, on all ranks: `[V]`.
    occurred: Vec<i64>,
    /// Where the earlier part left off.
    begin: Option<Position>,
}

impl<'a> Training<'a> {
    /// A run of this configuration on this data. `from`: where an earlier part of it left off. The catalogue may have grown
    /// since.
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
        let mut learner = learner(config, &data.features, place, item_table)?;
        let mut state = State::new(config, n_items, data.fingerprints.clone());
        let mut occurred = vec![0; n_items as usize];
        let begin = from.as_ref().map(|from| from.state().position);
        if let Some(from) = from {
            let n_counted = from.occurrences().len();
            if n_counted as i64 > n_items {
                return Err(from.mismatch(counts_other_items(n_counted, n_items)).into());
            }
            let &State { position, n_skipped, .. } = from.state();
            let Position { day, day_steps, .. } = position;
            let Some((_, window, _)) = data.days.iter().find(|(other, ..)| *other == day) else {
                let problem = format!("it is of day {day}, which the configuration does not train on");
                return Err(from.mismatch(problem).into());
            };
            let n_steps = plan(config, day, window).n_steps();
            if !position.is_end_of_day() && day_steps != n_steps {
                let problem = format!("its day {day} has {day_steps} steps, and now it would have {n_steps}");
                return Err(from.mismatch(problem).into());
            }
            learner.resume(&from)?;
            occurred[..n_counted].copy_from_slice(from.occurrences());
            // Another metric's values are none of this one's.
            let is_same_metric = from.state().config.checkpoint.keep_best == config.checkpoint.keep_best;
            let evaluated = if is_same_metric { from.state().evaluated.clone() } else { BTreeMap::new() };
            state = State { position, n_skipped, evaluated, ..state };
        }
        Ok(Self { config, data, place, learner, state, occurred, begin })
    }

    /// *All ranks.* Trains on every day, evaluates each on the next; rank 0 leaves checkpoints and results.
    ///
    /// # Errors
    /// See [`TrainError`].
    pub fn fit(
        self,
        run_dir: &Path,
        report: &mut Report,
        signals: &Signals,
        rows: &mut RowCheck,
    ) -> Result<Ended, TrainError> {
        let Self { config, data, place, mut learner, mut state, mut occurred, begin } = self;
        let root = place.collective.root();
        let checkpoints = Checkpoints::of(run_dir);
        let mut saver = root.map(|root| Saver::new(root, checkpoints.clone())).transpose()?;
        let mut last_metrics = None;
        for (day, window, valid) in
            data.days.iter().filter(|(day, ..)| begin.is_none_or(|begin| begin.day <= *day))
        {
            let plan = plan(config, *day, window);
            set_phase(format!("training on day {day}"));
            if begin.is_none_or(|begin| begin.day != *day) {
                add_occurrences(&mut occurred, window.today(), &data.features, place.collective)?;
                let global_step = state.position.global_step;
                state.position = Position { day: *day, day_step: 0, day_steps: plan.n_steps(), global_step };
            }
            let is_trained = begin.is_some_and(|begin| begin.day == *day && begin.is_end_of_day());
            if !is_trained {
                let mut context = Day {
                    config,
                    plan,
                    features: &data.features,
                    place,
                    report: &mut *report,
                    signals,
                    rows: &mut *rows,
                    checkpoints: &checkpoints,
                    saver: &mut saver,
                    occurrences: &occurred,
                    n_trained: 0,
                    last_log: (Instant::now(), state.position.day_step),
                    timer: PhaseTimer::new(place.device, config.train.time_phases, place.collective.watch()),
                    state: &mut state,
                };
                if context.train(&mut *learner)?.is_break() {
                    if let Some(saver) = &mut saver {
                        saver.finish()?;
                    }
                    return Ok(Ended::Stopped(state.position));
                }
            }

            rows.poll()?;
            set_phase(format!("evaluating on day {}", day + 1));
            let task = EvaluationTask {
                file: valid,
                features: &data.features,
                occurrences: &occurred,
                train_day: *day,
                eval_day: day + 1,
                split: Split::Valid,
            };
            let (record, evaluation) =
                task.evaluate(learner.recommender(), &learner.item_table(), config, place.collective)?;
            report.record(&record)?;
            task.save(run_dir, config, &evaluation, place.collective)?;
            let value = config.checkpoint.keep_best.map(|measure| measure.of(&evaluation.metrics));
            state.evaluated.extend(value.filter(|value| value.is_finite()).map(|value| (*day, value)));
            last_metrics = Some(evaluation.metrics);
        }
        if let Some(saver) = &mut saver {
            saver.finish()?;
        }
        if let (Some(root), Some(metrics)) = (root, last_metrics) {
            write_results(root, run_dir, &config.title(), &metrics)?;
        }
        Ok(Ended::Done)
    }
}

fn plan(config: &Config, day: i64, window: &Window) -> DayPlan {
    DayPlan {
        window: window.clone(),
        day,
        n_epochs: config.train.epochs_per_day,
        shape: step_shape(&config.train),
        seed: config.run.seed,
        max_steps: config.train.max_steps_per_day,
        one_batch_each: config.run.reduction == Reduction::Reproducible,
    }
}

/// *All ranks.* Adds the occurrences of the items of a whole file, `[V]`.
fn add_occurrences(
    total: &mut [i64],
    file: &SessionFile,
    features: &Features,
    collective: &dyn Collective,
) -> Result<(), TrainError> {
    let mut of_file = occurrences(file, features, (collective.rank(), collective.world_size()))?;
    collective.sum_i64(&mut of_file)?;
    total.iter_mut().zip(of_file).for_each(|(total, n)| *total += n);
    Ok(())
}
