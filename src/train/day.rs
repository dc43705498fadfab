//! One day of training: the inputs of a learner, and the records and checkpoints after its steps.

use std::ops::ControlFlow;
use std::time::Instant;

use tch::Device;

use super::gradient_sync::Requests;
use super::{Learner, RankContext, Signals, TrainError};
use crate::checkpoint::{Checkpoints, Position, Saver, State};
use crate::collective::phase_timer::PhaseTimer;
use crate::config::{Config, NonFinite};
use crate::data::{Catalogue, DayPlan, Features, Pretrained, RowCheck};
use crate::optim::{LateOutcome, SkippedStep, StepOutcome, StepValues};
use crate::report::{Record, Report};

/// The inputs and the state of a day of training.
pub(super) struct Day<'a> {
    pub config: &'a Config,
    pub plan: DayPlan,
    pub features: &'a Features,
    /// Attributes of all items, if there is such a file.
    pub catalogue: Option<&'a Catalogue>,
    /// Vectors that items begin with, if the configuration names a file.
    pub pretrained: Option<&'a Pretrained>,
    /// Whether no day was trained on before this one.
    pub is_first: bool,
    pub place: RankContext<'a>,
    pub report: &'a mut Report,
    pub signals: &'a Signals,
    pub rows: &'a mut RowCheck,
    pub checkpoints: &'a Checkpoints,
    /// On rank 0.
    pub saver: &'a mut Option<Saver>,
    /// Occurrences of each item in training so far, including this day, on all ranks: `[V]`.
    pub occurrences: &'a [i64],
    pub state: &'a mut State,
    /// Sessions of the steps that this process has trained on today, over all ranks.
    pub n_trained: usize,
    pub last_record: LastRecord,
    pub timer: PhaseTimer,
    /// A step whose outcome is on its way.
    pub late: Option<LateStatus>,
    /// Steps without effect that were reported, since the start of the process.
    pub n_reported: &'a mut usize,
}

/// The outcome of a step that is read after the next, so that the GPU does not wait for the host.
pub(super) struct LateStatus {
    outcome: LateOutcome,
    /// From 1.
    step: usize,
    lr: f64,
}

/// Time and finished steps of the day at the last record of a step.
pub(super) struct LastRecord {
    pub time: Instant,
    pub day_step: usize,
}

impl Day<'_> {
    pub fn rank(&self) -> usize {
        self.place.collective.rank()
    }

    /// *All ranks.* Trains on the remaining steps of the day; breaks if a stop was requested. In
    /// both cases a checkpoint holds the result.
    pub fn train(&mut self, learner: &mut dyn Learner) -> Result<ControlFlow<()>, TrainError> {
        let (day, n_steps) = (self.plan.day, self.plan.n_steps());
        let n_done = self.state.position.day_step;
        self.report.begin_day(day, (n_done, n_steps), self.plan.window.n_sessions());
        let begun = Instant::now();
        let flow = learner.learn_day(self)?;
        if flow.is_break() {
            return Ok(flow);
        }
        let seconds = begun.elapsed().as_secs_f64();
        let (n_sessions, n_trained) = if self.n_trained == 0 {
            // A baseline has no steps and counts each session once.
            let n_today = self.plan.window.today().n_sessions();
            (n_today, n_today)
        } else {
            ((0..n_steps).map(|step| self.plan.sessions_in_step(step)).sum(), self.n_trained)
        };
        self.report.end_day();
        let sessions_per_s = n_trained as f64 / seconds;
        self.report.record(&Record::Day { day, n_sessions, seconds, sessions_per_s })?;
        self.state.position.day_step = n_steps;
        self.save(learner)?;
        // Stop before the evaluation, which may take longer than a scheduler's grace period.
        let mut n_stop = [i64::from(self.signals.stop_requested())];
        self.place.collective.sum_i64(&mut n_stop)?;
        Ok(if n_stop[0] > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Requests to this rank: by signals, and by the clock for a checkpoint.
    pub fn requests(&self) -> Requests {
        let every = self.config.checkpoint.every_minutes;
        let minutes =
            self.saver.as_ref().map_or(0.0, |saver| saver.since_last().as_secs_f64() / 60.0);
        let is_due = every > 0.0 && minutes >= every;
        Requests {
            stop: self.signals.stop_requested(),
            save: self.signals.save_requested() || is_due,
        }
    }

    /// *All ranks.* Records a finished step and writes a checkpoint if one is due; breaks if a stop
    /// was requested. `lr`: learning rate of the step.
    ///
    /// On a GPU the outcome is read only if it is needed, and after the next step if that is soon
    /// enough.
    pub fn step_done(
        &mut self,
        learner: &dyn Learner,
        lr: f64,
        outcome: &StepOutcome,
    ) -> Result<ControlFlow<()>, TrainError> {
        self.rows.poll()?;
        let config = self.config;
        let step = self.state.position.day_step;
        let (n_done, n_steps) = (step + 1, self.plan.n_steps());
        self.state.position.day_step = n_done;
        self.state.position.global_step += 1;
        self.n_trained += self.plan.sessions_in_step(step);
        self.report.tick();
        let is_logged = n_done.is_multiple_of(config.train.log_every_steps) || n_done == n_steps;
        let every = config.checkpoint.every_steps;
        let is_due = every > 0 && n_done.is_multiple_of(every);
        // All conditions are the same on all ranks, and so are the values that are read, so that
        // all ranks reach the collective calls below.
        let (mut saves, mut stops) = (false, false);
        if let Some(LateStatus { outcome, step, lr }) = self.late.take() {
            let values = outcome.read();
            (saves, stops) = (values.save, values.stop);
            self.report(&values, step, Some(lr))?;
        }
        if is_due || n_done == n_steps || self.place.device == Device::Cpu {
            let values = outcome.read();
            (saves, stops) = (saves || values.save, stops || values.stop);
            self.report(&values, n_done, is_logged.then_some(lr))?;
        } else if is_logged {
            // The GPU has other work until the next step asks for the values.
            let outcome = outcome.read_later();
            self.late = Some(LateStatus { outcome, step: n_done, lr });
        }
        // The last step of a day is followed by the checkpoint of `train`.
        if n_done < n_steps && (is_due || saves || stops) {
            self.save(learner)?;
        }
        if let Some(saver) = self.saver.as_mut()
            && saver.has_failed()
        {
            saver.finish()?;
        }
        Ok(if stops && n_done < n_steps {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    }

    /// *All ranks.* Reports what was read of step `step` of the day (from 1), and records it if its
    /// learning rate `lr` is given.
    fn report(
        &mut self,
        values: &StepValues,
        step: usize,
        lr: Option<f64>,
    ) -> Result<(), TrainError> {
        if values.save {
            self.signals.clear_save();
        }
        self.report_skipped(values, step)?;
        lr.map_or(Ok(()), |lr| self.record_step(values, step, lr))
    }

    /// Records step `step` of the day, with averages over the steps since the last record.
    fn record_step(&mut self, values: &StepValues, step: usize, lr: f64) -> Result<(), TrainError> {
        let &StepValues { loss, n_targets, .. } = values;
        let day = self.plan.day;
        let now = Instant::now();
        let last =
            std::mem::replace(&mut self.last_record, LastRecord { time: now, day_step: step });
        let n_sessions: usize =
            (last.day_step..step).map(|step| self.plan.sessions_in_step(step)).sum();
        let epoch = (step - 1) / self.plan.steps_per_epoch();
        let sessions_per_s = n_sessions as f64 / (now - last.time).as_secs_f64();
        self.report.record(&Record::Step {
            day,
            epoch,
            step,
            loss,
            n_targets,
            lr,
            sessions_per_s,
        })?;
        if let Some(phases) = self.timer.take() {
            let n_steps = (step - last.day_step) as f64;
            let seconds =
                phases.into_iter().map(|(name, seconds)| (name, seconds / n_steps)).collect();
            self.report.record(&Record::Phases { day, step, seconds })?;
        }
        Ok(())
    }

    /// *All ranks.* Records the steps since the last call whose loss or gradient was not finite, or
    /// fails if one may not be skipped. `n_done`: steps of the day so far.
    fn report_skipped(&mut self, values: &StepValues, n_done: usize) -> Result<(), TrainError> {
        let n_new = values.n_skipped - std::mem::replace(self.n_reported, values.n_skipped);
        let n_known = values.skipped.len();
        let day = self.plan.day;
        for skipped in &values.skipped[n_known - n_new.min(n_known)..] {
            let n_skipped = self.state.n_skipped;
            let &SkippedStep { n_after, loss, norm, is_own_loss_finite } = skipped;
            let step = n_done.saturating_sub(n_after);
            match self.config.train.non_finite {
                NonFinite::Skip { limit } if n_skipped < limit => {
                    self.state.n_skipped += 1;
                    self.report.record(&Record::Skipped { day, step, loss, norm })?;
                }
                NonFinite::Skip { .. } | NonFinite::Stop => {
                    let all = self.place.collective.gather(&[u8::from(!is_own_loss_finite)])?;
                    let ranks = (0..all.len()).filter(|&rank| all[rank] == 1).collect();
                    return Err(TrainError::NotFinite { loss, norm, day, step, ranks, n_skipped });
                }
            }
        }
        Ok(())
    }

    /// *All ranks.* Writes a checkpoint. Rank 0 starts writing in the background; with a sharded
    /// item table all ranks take part until it is written.
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
