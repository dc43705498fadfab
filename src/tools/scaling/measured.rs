//! Step times of a run, from its `metrics.jsonl`.

use std::collections::BTreeMap;

use crate::run_log::{self, LoggedRecord};

/// Steps before the first that is measured.
pub const WARM_UP_STEPS: usize = 3;

/// Medians over the measured steps of a run, and the rate of its evaluation.
#[derive(Clone, Debug, PartialEq)]
pub struct StepMeasurement {
    /// Sessions per step of all ranks.
    pub global_batch: usize,
    pub step_seconds: f64,
    /// Seconds per step of rank 0, by phase.
    pub phases: BTreeMap<String, f64>,
    /// Targets per step.
    pub n_targets: f64,
    /// Sessions per second of the evaluation.
    pub evaluated_per_s: f64,
}

impl StepMeasurement {
    /// Reads the records of a run that logged every step and its phases.
    ///
    /// # Errors
    /// Returns the first invalid line, or what the records lack.
    pub fn read(text: &str, global_batch: usize) -> Result<Self, String> {
        let (mut seconds, mut n_targets) = (Vec::new(), Vec::new());
        let mut phases = BTreeMap::<String, Vec<f64>>::new();
        let mut evaluated_per_s = None;
        for record in run_log::parse(text).map_err(|invalid| invalid.to_string())? {
            match record {
                LoggedRecord::Step(step) => {
                    let rate = step.sessions_per_s.ok_or("a step has no `sessions_per_s`")?;
                    seconds.push(global_batch as f64 / rate);
                    n_targets.push(step.n_targets as f64);
                }
                LoggedRecord::Phases(of_step) => {
                    let of_step =
                        of_step.into_iter().filter(|(name, _)| name != "day" && name != "step");
                    of_step
                        .for_each(|(name, seconds)| phases.entry(name).or_default().push(seconds));
                }
                LoggedRecord::Eval(evaluation) => {
                    evaluated_per_s =
                        evaluation.seconds.map(|seconds| evaluation.n_sessions / seconds);
                }
                LoggedRecord::Day(_) | LoggedRecord::Other => {}
            }
        }
        let phases = phases.into_iter().filter_map(|(name, of)| Some((name, median(&of)?)));
        Ok(Self {
            global_batch,
            step_seconds: median(&seconds).ok_or("it has too few steps")?,
            phases: phases.collect(),
            n_targets: median(&n_targets).ok_or("it has too few steps")?,
            evaluated_per_s: evaluated_per_s.ok_or("it has no evaluation")?,
        })
    }

    /// Summed seconds of the phases whose names are in `names`.
    pub(super) fn phase_seconds(&self, names: &[&str]) -> f64 {
        let phases = self.phases.iter().filter(|(name, _)| names.contains(&name.as_str()));
        phases.map(|(_, seconds)| seconds).sum()
    }
}

/// Without the warm-up; none where there are no further steps.
fn median(of_steps: &[f64]) -> Option<f64> {
    let mut measured = of_steps.get(WARM_UP_STEPS..).unwrap_or_default().to_vec();
    measured.sort_by(f64::total_cmp);
    measured.get(measured.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_become_medians_without_the_first_steps() {
        let mut text = String::new();
        for (step, rate) in [1.0, 1.0, 1.0, 200.0, 50.0, 100.0].iter().enumerate() {
            text += &format!(
                "{{\"kind\":\"step\",\"day\":1,\"step\":{step},\"loss\":1,\"n_targets\":{step},\
                 \"sessions_per_s\":{rate}}}\n"
            );
            text += &format!(
                "{{\"kind\":\"phases\",\"day\":1,\"step\":{step},\"loss\":{rate},\"data\":0.5}}\n"
            );
        }
        let read = |text: &str| StepMeasurement::read(text, 100);
        assert_eq!(read(&text), Err("it has no evaluation".to_owned()));
        text += r#"{"kind":"day","day":1,"n_sessions":600,"seconds":1,"sessions_per_s":600}"#;
        text += "\n";
        text += "{\"kind\":\"eval\",\"n_sessions\":50,\"seconds\":0.5}\n";
        text += "{\"kind\":\"checkpoint\",\"day\":1}\n";
        let StepMeasurement { step_seconds, n_targets, phases, evaluated_per_s, .. } =
            read(&text).unwrap();
        assert_eq!((step_seconds, n_targets, evaluated_per_s), (1.0, 4.0, 100.0));
        assert_eq!(phases, BTreeMap::from([("data".to_owned(), 0.5), ("loss".to_owned(), 100.0)]));
        let few: Vec<_> = text.lines().filter(|line| !line.contains("phases")).skip(3).collect();
        assert_eq!(read(&few.join("\n")), Err("it has too few steps".to_owned()));
        assert_eq!(read(&text[..20]), Err("line 1: EOF while parsing an object".to_owned()));
    }
}
