//! Training steps as one CUDA graph.
//!
//! The first steps of a day run operation by operation, so that libraries load kernels and allocate
//! memory. The next is recorded, and every later one is a copy of its numbers to the frame and one
//! launch. The graph reads the tables of the day, so each day has its own.
//!
//! In the reproducible mode a step has a pass for each of its micro-batches. A pass is recorded,
//! and the end of the step runs operation by operation.

use bireme_kernels::cuda::graph::Graph;
use bireme_kernels::transfer::Frame;
use tch::Device;

use super::{Day, TrainError};
use crate::collective::Reduce;
use crate::config::{Config, CudaGraph};
use crate::model::{Network, Objective, Preparer, SizeBounds, StepSizes};
use crate::optim::StepOutcome;
use crate::report::Record;

/// Steps before the recorded one.
const N_WARM_UP: usize = 3;

/// How the steps of a day run.
pub(super) struct StepGraph {
    state: State,
    /// Where the numbers of every step are, if their sizes are the same.
    frame: Frame,
    /// Whether all steps have the same sizes.
    has_sizes: bool,
    /// These sizes, once they are known.
    sizes: Option<StepSizes>,
}

enum State {
    /// Operation by operation.
    Eager,
    /// The next steps of the same sizes will be recorded.
    WarmUp { n_left: usize },
    Captured {
        graph: Graph,
        /// Of the recorded pass, if it ends its step.
        outcome: Option<StepOutcome>,
    },
}

/// Why steps of this run cannot have the same sizes.
fn obstacle_to_sizes(network: &Network<'_>) -> Option<&'static str> {
    matches!(network.objective(), Objective::Replaced { .. })
        .then_some("the objective is `replaced`")
}

/// Why a step of this run, whose sizes are always the same, cannot be recorded.
fn obstacle(config: &Config, has_fault: bool) -> Option<&'static str> {
    let obstacles = [
        (config.run.cuda_graph == CudaGraph::Off, "`run.cuda_graph` is `off`"),
        (config.train.time_phases, "`train.time_phases` is set"),
        (has_fault, "a fault is planted"),
    ];
    obstacles.into_iter().find(|(is_so, _)| *is_so).map(|(_, obstacle)| obstacle)
}

impl StepGraph {
    /// Decides how the steps of a day run, and records it if they are on a GPU.
    ///
    /// # Errors
    /// `run.cuda_graph` is `require`, and the run does not allow it.
    pub fn new(
        network: &Network<'_>,
        has_fault: bool,
        day: &mut Day<'_>,
    ) -> Result<Self, TrainError> {
        let mut graph =
            Self { state: State::Eager, frame: Frame::default(), has_sizes: false, sizes: None };
        if day.place.device == Device::Cpu {
            graph.give_up("the run is on the CPU", day)?;
            return Ok(graph);
        }
        let to_sizes = obstacle_to_sizes(network);
        graph.has_sizes = to_sizes.is_none();
        match to_sizes.or_else(|| obstacle(day.config, has_fault)) {
            None => graph.state = State::WarmUp { n_left: N_WARM_UP },
            Some(obstacle) => graph.give_up(obstacle, day)?,
        }
        Ok(graph)
    }

    /// Whether all steps have the same sizes.
    pub fn has_sizes(&self) -> bool {
        self.has_sizes
    }

    /// *All ranks.* Agrees on sizes for the steps of an epoch within `bounds` of this rank. They
    /// follow from the epoch alone, so that a resumed run has the same.
    ///
    /// # Errors
    /// A collective call fails.
    pub fn agree_on_sizes(
        &mut self,
        bounds: &SizeBounds,
        preparer: &Preparer,
        day: &Day<'_>,
    ) -> Result<StepSizes, TrainError> {
        let mut numbers = bounds.numbers();
        day.place.collective.reduce(&mut numbers, Reduce::Max)?;
        let first_day = day.plan.window.first_day();
        let sizes =
            preparer.sizes(&SizeBounds::from_numbers(numbers), preparer.leaves_out(first_day));
        if self.sizes.as_ref() != Some(&sizes) {
            self.frame = Frame::default();
            if !matches!(self.state, State::Eager) {
                self.state = State::WarmUp { n_left: N_WARM_UP };
            }
        }
        Ok(self.sizes.insert(sizes).clone())
    }

    /// The memory that the numbers of a step are sent to.
    pub fn frame(&mut self) -> &mut Frame {
        if self.sizes.is_none() {
            // Steps differ in size.
            self.frame = Frame::default();
        }
        &mut self.frame
    }

    /// *All ranks.* Runs a pass whose numbers are in the frame: `run` queues its operations, or the
    /// graph that recorded them does.
    ///
    /// # Errors
    /// `run` fails, or a launch does; or `run.cuda_graph` is `require`, and the step cannot be
    /// recorded.
    pub fn run(
        &mut self,
        day: &mut Day<'_>,
        mut run: impl FnMut(&mut Day<'_>) -> Result<Option<StepOutcome>, TrainError>,
    ) -> Result<Option<StepOutcome>, TrainError> {
        match &mut self.state {
            State::Eager => run(day),
            State::WarmUp { n_left: 0 } => {
                let captured = Graph::capture(|| run(day));
                let captured = match captured {
                    Ok((graph, outcome)) => Ok((graph, outcome?)),
                    Err(problem) => Err(problem),
                };
                let is_captured = day.place.collective.gather(&[u8::from(captured.is_ok())])?;
                match captured {
                    Ok((graph, outcome))
                        if is_captured.iter().all(|&is_captured| is_captured == 1) =>
                    {
                        let day_number = day.plan.day;
                        day.report.record(&Record::Graph {
                            day: day_number,
                            captured: true,
                            why: None,
                        })?;
                        graph.replay().map_err(TrainError::GraphLaunch)?;
                        let first = outcome.as_ref().map(StepOutcome::share);
                        self.state = State::Captured { graph, outcome };
                        Ok(first)
                    }
                    other => {
                        let problem = other.err();
                        let problem =
                            problem.as_deref().unwrap_or("another rank could not record the step");
                        self.state = State::Eager;
                        self.give_up(problem, day)?;
                        run(day)
                    }
                }
            }
            State::WarmUp { n_left } => {
                *n_left -= 1;
                run(day)
            }
            State::Captured { graph, outcome } => {
                graph.replay().map_err(TrainError::GraphLaunch)?;
                Ok(outcome.as_ref().map(StepOutcome::share))
            }
        }
    }

    /// Records why steps run operation by operation.
    fn give_up(&self, obstacle: &str, day: &mut Day<'_>) -> Result<(), TrainError> {
        if day.config.run.cuda_graph == CudaGraph::Require {
            return Err(TrainError::GraphRequired(obstacle.to_owned()));
        }
        if day.place.device != Device::Cpu {
            let why = Some(obstacle.to_owned());
            day.report.record(&Record::Graph { day: day.plan.day, captured: false, why })?;
        }
        Ok(())
    }
}
