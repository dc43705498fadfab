//! One day of training: what a learner reads, and what is recorded and saved after its steps.

use std::ops::ControlFlow;
use std::time::Instant;

use tch::Device;

use super::gradient_sync::{Requests, StepOutcome, StepValues};
use super::{Learner, RankContext, Signals, TrainError};
use crate::checkpoint::{Checkpoints, Position, Saver, State};
use crate::collective::phase_timer::PhaseTimer;
use crate::config::{Config, NonFinite};
use crate::data::{DayPlan, Features, RowCheck};
use crate::report::{Record, Report};

/// What a learner is given to learn one day.
pub(super) struct Day<'a> {
    pub config: &'a Config,
    pub plan: DayPlan,
    pub features: &'a Features,
    pub place: RankContext<'a>,
    pub report: &'a mut Report,
    pub signals: &'a Signals,
    pub rows: &'a mut RowCheck,
    pub checkpoints: &'a Checkpoints,
    /// On rank 0.
    pub saver: &'a mut Option<Saver>,
    /// How often each item occurred in training so far, this day included, on all ranks: `[V]`.
    pub occurrences: &'a [i64],
    /// Of the run as far as it has come.
    pub state: &'a mut State,
    /// Sessions of the steps done today by this process, over all ranks.
    pub n_trained: usize,
    /// When the last record was written, and how many steps were done then.
    pub last_log: (Instant, usize),
    /// What time is spent on.
    pub timer: PhaseTimer,
}

impl Day<'_> {
    pub fn rank(&self) -> usize {
        self.place.collective.rank()
    }

    /// *All ranks.* Trains on what is left of the day; breaks off where a rank was asked to. Either way a checkpoint holds
    /// what was done.
    pub fn train(&mut self, learner: &mut dyn Learner) -> Result<ControlFlow<()>, TrainError> {
        let (day, n_steps) = (self.plan.day, self.plan.n_steps());
        let day_step = self.state.position.day_step;
        self.report.begin_day(day, (day_step, n_steps), self.plan.window.n_sessions());
        let begun = Instant::now();
        let went = learner.learn_day(self)?;
        if went.is_break() {
            return Ok(went);
        }
        let seconds = begun.elapsed().as_secs_f64();
        // A learner without steps counts each session once.
        let (n_sessions, n_here) = match self.n_trained {
            0 => (self.plan.window.today().n_sessions(), self.plan.window.today().n_sessions()),
            n_here => ((0..n_steps).map(|step| self.plan.sessions_in_step(step)).sum(), n_here),
        };
        self.report.end_day();
        let sessions_per_s = n_here as f64 / seconds;
        self.report.record(&Record::Day { day, n_sessions, seconds, sessions_per_s })?;
        self.state.position.day_step = n_steps;
        self.save(learner)?;
        // An evaluation may take longer than whoever asked will wait.
        let mut is_stop = [i64::from(self.signals.stop())];
        self.place.collective.sum_i64(&mut is_stop)?;
        Ok(if is_stop[0] > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Requests to this rank: signals, and a checkpoint that is due by the clock.
    pub fn requests(&self) -> Requests {
        let every = self.config.checkpoint.every_minutes;
        let minutes = self.saver.as_ref().map_or(0.0, |saver| saver.since_last().as_secs_f64() / 60.0);
        let is_due = every > 0.0 && minutes >= every;
        Requests { stop: self.signals.stop(), save: self.signals.save() || is_due }
    }

    /// *All ranks.* The next step is done, at this learning rate. Breaks where a rank was asked to stop.
    ///
    /// On a GPU the status is read only where it is needed, as that waits for the device.
    pub fn step_done(
        &mut self,
        learner: &dyn Learner,
        lr: f64,
        outcome: &StepOutcome,
    ) -> Result<ControlFlow<()>, TrainError> {
        self.rows.poll()?;
        let config = self.config;
        let step = self.state.position.day_step;
        let (done, n_steps) = (step + 1, self.plan.n_steps());
        self.state.position.day_step = done;
        self.state.position.global_step += 1;
        self.n_trained += self.plan.sessions_in_step(step);
        self.report.tick();
        let is_logged = done.is_multiple_of(config.train.log_every_steps) || done == n_steps;
        let every = config.checkpoint.every_steps;
        let is_due = every > 0 && done.is_multiple_of(every);
        let may_skip = config.train.non_finite != NonFinite::Stop;
        if !(is_logged || is_due || may_skip || self.place.device == Device::Cpu) {
            return Ok(ControlFlow::Continue(()));
        }
        let values = outcome.read();
        let Requests { stop, save } = values.requests;
        if save {
            self.signals.saved();
        }
        if !values.is_finite() {
            self.not_finite(&values, outcome, done)?;
        }
        let StepValues { loss, n_targets, .. } = values;
        if is_logged {
            let (day, (since, logged)) = (self.plan.day, self.last_log);
            let seconds = since.elapsed().as_secs_f64();
            let n_sessions: usize = (logged..done).map(|step| self.plan.sessions_in_step(step)).sum();
            self.last_log = (Instant::now(), done);
            let n_steps = (done - logged) as f64;
            let epoch = step / self.plan.steps_per_epoch();
            let sessions_per_s = n_sessions as f64 / seconds;
            self.report.record(&Record::Step {
                day,
                epoch,
                step: done,
                loss,
                n_targets,
                lr,
                sessions_per_s,
            })?;
            if let Some(timer) = self.timer.take() {
                let seconds = timer.into_iter().map(|(name, seconds)| (name, seconds / n_steps)).collect();
                self.report.record(&Record::Phases { day, step: done, seconds })?;
            }
        }
        // At its end the day saves itself.
        if done < n_steps && (is_due || save || stop) {
            self.save(learner)?;
        }
        match self.saver {
            Some(saver) if saver.has_failed() => saver.finish()?,
            _ => {}
        }
        Ok(if stop && done < n_steps { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// *All ranks.* A step whose loss or gradient is not finite: left out, or the end.
    fn not_finite(
        &mut self,
        values: &StepValues,
        outcome: &StepOutcome,
        step: usize,
    ) -> Result<(), TrainError> {
        let (n_skipped, day) = (self.state.n_skipped, self.plan.day);
        let &StepValues { loss, norm, .. } = values;
        match self.config.train.non_finite {
            NonFinite::Skip { limit } if n_skipped < limit => {
                self.state.n_skipped += 1;
                Ok(self.report.record(&Record::Skipped { day, step, loss, norm })?)
            }
            NonFinite::Skip { .. } | NonFinite::Stop => {
                let is_mine = u8::from(!outcome.is_own_loss_finite());
                let all = self.place.collective.gather(&[is_mine])?;
                let ranks = (0..all.len()).filter(|&rank| all[rank] == 1).collect();
                Err(TrainError::NotFinite { loss, norm, day, step, ranks, n_skipped })
            }
        }
    }

    /// *All ranks.* Takes a checkpoint: rank 0 begins one in the background, unless tables are shared out, where all take part
    /// until it is written.
    fn save(&mut self, learner: &dyn Learner) -> Result<(), TrainError> {
        let item_table = learner.item_table();
        if !item_table.is_sharded() && self.saver.is_none() {
            return Ok(());
        }
        let state = State {
            optimizer_steps: learner.optimizer_steps(),
            log_bytes: self.report.sync()?,
            ..self.state.clone()
        };
        let (tensors, occurrences) = (learner.tensors(), self.occurrences);
        let begun = Instant::now();
        if item_table.is_sharded() {
            self.checkpoints.write_shared(
                &state,
                &tensors,
                occurrences,
                &item_table,
                self.place.collective,
            )?;
            self.saver.iter_mut().for_each(Saver::reset_timer);
        } else if let Some(saver) = &mut self.saver {
            saver.save(state, &tensors, occurrences)?;
        }
        let waited_seconds = begun.elapsed().as_secs_f64();
        let Position { day, day_step: step, .. } = self.state.position;
        Ok(self.report.record(&Record::Checkpoint { day, step, waited_seconds })?)
    }
}
