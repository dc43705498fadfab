//! Compares runs: metrics with intervals, differences, and both by segment of the sessions.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bireme_base::user_error::{REFUSED, UserError};
use serde::{Serialize, Serializer};

use super::bootstrap::{CONFIDENCE, Estimate, bootstrap};
use super::evaluation_file::{EvaluationFacts, SessionOutcome};
use super::runs::FinishedRun;
use super::segments::{Segment, SegmentBy, compared_segments};
use crate::measure::{Measure, RankCounts, rank_bin};
use crate::run_log::{LoggedStep, TrainedDay};

/// Longer learning curves are averaged over neighbouring steps.
const MAX_CURVE_POINTS: usize = 400;

/// An estimate of each [`Measure`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimates([Estimate; 5]);

impl Estimates {
    pub fn get(&self, measure: Measure) -> Estimate {
        self.0[measure as usize]
    }

    /// Means over sessions whose held-out items had these ranks.
    fn of(ranks: impl Iterator<Item = i64>, n_resamples: u32) -> Self {
        let mut at_rank = RankCounts::default();
        ranks.for_each(|rank| at_rank[rank_bin(rank)] += 1);
        Self(bootstrap(&at_rank, n_resamples, |counts| {
            means(counts.try_into().expect("a count for each rank"))
        }))
    }

    /// Differences between two runs on the same sessions, resampled in pairs of ranks.
    fn of_difference(ranks: impl Iterator<Item = (i64, i64)>, n_resamples: u32) -> Self {
        let mut at_ranks: BTreeMap<(usize, usize), i64> = BTreeMap::new();
        ranks.for_each(|(a, b)| *at_ranks.entry((rank_bin(a), rank_bin(b))).or_default() += 1);
        let counts: Vec<i64> = at_ranks.values().copied().collect();
        Self(bootstrap(&counts, n_resamples, |counts| {
            let (mut of_a, mut of_b) = (RankCounts::default(), RankCounts::default());
            for (&(a, b), n) in at_ranks.keys().zip(counts) {
                of_a[a] += n;
                of_b[b] += n;
            }
            let (means_a, means_b) = (means(&of_a), means(&of_b));
            std::array::from_fn(|measure| means_a[measure] - means_b[measure])
        }))
    }
}

fn means(counts: &RankCounts) -> [f64; 5] {
    Measure::ALL.map(|measure| measure.mean(counts))
}

impl Serialize for Estimates {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Measure::ALL.map(|measure| (measure.key(), self.get(measure))))
    }
}

/// The content of a report. Lists by run are in the order of [`Comparison::runs`].
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Version of the layout of `report.json`.
    pub format: u32,
    /// Version of the program.
    pub bireme: &'static str,
    /// Resamples per interval.
    pub n_resamples: u32,
    /// Level of the intervals.
    pub confidence: f64,
    pub warnings: Vec<String>,
    /// In the order given.
    pub runs: Vec<RunSummary>,
    /// Evaluations common to all runs, in order of time.
    pub evaluations: Vec<EvaluatedPart>,
    /// On the last evaluation; none for a single run.
    pub differences: Option<Differences>,
    /// The last evaluation by [`SegmentBy::TargetKind`].
    pub by_target_kind: Vec<SessionGroup>,
    /// The last evaluation by [`SegmentBy::TargetSupport`].
    pub by_target_support: Vec<SessionGroup>,
    /// The last evaluation by the number of known events of a session.
    pub by_known_events: Vec<SessionGroup>,
    /// The last evaluation by the popularity decile of the held-out item.
    pub by_popularity_decile: Vec<SessionGroup>,
}

impl Comparison {
    /// The evaluation of the latest day; of its parts, test before valid.
    pub fn last(&self) -> &EvaluatedPart {
        self.evaluations.last().expect("every run evaluated at least one day")
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct RunSummary {
    /// Its name in the report.
    pub label: String,
    /// The model's name.
    pub title: String,
    /// `model.kind`.
    pub kind: String,
    /// Whether its model counts instead of learning.
    pub is_baseline: bool,
    pub path: PathBuf,
    /// Content of `run.json`.
    pub machine: serde_json::Value,
    /// Configuration as resolved, in TOML.
    pub config: String,
    pub days: Vec<TrainedDay>,
    pub learning_curve: Vec<CurvePoint>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CurvePoint {
    /// Steps since the start of the run.
    pub step: f64,
    /// Mean over targets.
    pub loss: f64,
}

/// One part of one day, evaluated by all runs.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluatedPart {
    /// Last day trained on.
    pub train_day: i64,
    /// Day evaluated on.
    pub eval_day: i64,
    /// `valid` or `test`.
    pub split: String,
    pub n_sessions: usize,
    pub runs: Vec<EvaluatedRun>,
}

impl EvaluatedPart {
    /// `day 3 (valid)`.
    pub fn name(&self) -> String {
        day_name(self.eval_day, &self.split)
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct EvaluatedRun {
    pub label: String,
    /// Cross entropy of the held-out item, for models whose scores are logits.
    pub loss: Option<f64>,
    /// Share of the catalogue that is in the top 20 of at least one session.
    pub coverage_at_20: Option<f64>,
    #[serde(flatten)]
    pub estimates: Estimates,
}

/// Each run minus the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Differences {
    /// Label of the baseline with the highest NDCG@20; of the first run if no run is a baseline.
    pub reference: String,
    /// Without the reference.
    pub runs: Vec<Difference>,
}

/// One run minus the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    pub label: String,
    #[serde(flatten)]
    pub estimates: Estimates,
    /// By kind of target, support and known events.
    pub segments: Vec<SegmentDifference>,
    /// The segments in which the run has a lower NDCG@20 than the reference, in words.
    pub summary: String,
}

/// One run minus the reference in one segment.
#[derive(Clone, Debug, Serialize)]
pub struct SegmentDifference {
    pub by: SegmentBy,
    pub label: String,
    pub n_sessions: usize,
    pub ndcg_at_20: Estimate,
}

#[derive(Clone, Debug, Serialize)]
pub struct SessionGroup {
    pub label: String,
    pub n_sessions: usize,
    pub runs: Vec<Estimates>,
}

/// Runs that cannot be compared.
#[derive(Debug, thiserror::Error)]
#[error(
    "runs `{}` and `{}` cannot be compared{}: {problem}",
    a.display(),
    b.display(),
    on.as_deref().unwrap_or_default()
)]
pub struct CompareError {
    a: PathBuf,
    b: PathBuf,
    /// ` on day 3 (valid)`.
    on: Option<String>,
    problem: String,
}

impl UserError for CompareError {
    fn exit_code(&self) -> i32 {
        REFUSED
    }
}

/// Compares runs that evaluated the same sessions.
///
/// # Errors
/// Returns an error if runs evaluated other sessions, or after other days of training.
pub fn compare(runs: &[FinishedRun], n_resamples: u32) -> Result<Comparison, CompareError> {
    let (first, others) = runs.split_first().expect("at least one run");
    for other in others {
        check_same_sessions(first, other)?;
    }
    let parts = 0..first.evaluations.len();
    let evaluations: Vec<EvaluatedPart> =
        parts.map(|part| evaluated_part(runs, part, n_resamples)).collect();
    let last = evaluations.last().expect("every run evaluated at least one day");
    let groups = |by: SegmentBy| groups(runs, &by.segments(last_outcomes(first)), n_resamples);
    Ok(Comparison {
        format: 1,
        bireme: env!("CARGO_PKG_VERSION"),
        n_resamples,
        confidence: CONFIDENCE,
        warnings: warnings(runs),
        differences: differences(runs, last, n_resamples),
        by_target_kind: groups(SegmentBy::TargetKind),
        by_target_support: groups(SegmentBy::TargetSupport),
        by_known_events: groups(SegmentBy::KnownEvents),
        by_popularity_decile: groups(SegmentBy::PopularityDecile),
        runs: runs.iter().map(summary).collect(),
        evaluations,
    })
}

fn last_outcomes(run: &FinishedRun) -> &[SessionOutcome] {
    &run.evaluations.last().expect("every run evaluated at least one day").1
}

fn check_same_sessions(a: &FinishedRun, b: &FinishedRun) -> Result<(), CompareError> {
    let refuse = |on: Option<&EvaluationFacts>, problem: String| {
        let on = on.map(|facts| format!(" on {}", name(facts)));
        Err(CompareError { a: a.path.clone(), b: b.path.clone(), on, problem })
    };
    for (one, other) in [(a, b), (b, a)] {
        let has = |facts: &EvaluationFacts| {
            other.evaluations.iter().any(|(theirs, _)| name(theirs) == name(facts))
        };
        if let Some((facts, _)) = one.evaluations.iter().find(|(facts, _)| !has(facts)) {
            return refuse(
                None,
                format!("only `{}` evaluated {}", one.path.display(), name(facts)),
            );
        }
    }
    for ((facts_a, of_a), (facts_b, of_b)) in a.evaluations.iter().zip(&b.evaluations) {
        let (days_a, days_b) = (facts_a.train_day, facts_b.train_day);
        if days_a != days_b {
            let problem =
                format!("the first was trained to day {days_a}, the second to day {days_b}");
            return refuse(Some(facts_a), problem);
        }
        if of_a.len() != of_b.len() {
            let problem =
                format!("the first has {} sessions, the second {}", of_a.len(), of_b.len());
            return refuse(Some(facts_a), problem);
        }
        if let Some(row) = of_a.iter().zip(of_b).position(|(a, b)| a.target != b.target) {
            let (a, b) = (of_a[row].target, of_b[row].target);
            let problem = format!(
                "the held-out item of session {row} is {a} in the first and {b} in the second"
            );
            return refuse(Some(facts_a), problem);
        }
    }
    Ok(())
}

fn day_name(eval_day: i64, split: &str) -> String {
    format!("day {eval_day} ({split})")
}

fn name(facts: &EvaluationFacts) -> String {
    day_name(facts.eval_day, &facts.split)
}

fn warnings(runs: &[FinishedRun]) -> Vec<String> {
    let mut warnings = Vec::new();
    if !runs.iter().any(FinishedRun::is_baseline) {
        let text = "no baseline was given: add a run of a counting model to compare with \
                    (`model.kind` popularity, recent, markov, vsknn or loglinear)";
        warnings.push(text.to_owned());
    }
    let known = |run| last_outcomes(run).iter().map(|outcome| outcome.n_known);
    if let Some(run) = runs.iter().find(|run| !known(run).eq(known(&runs[0]))) {
        let (first, other) = (&runs[0].label, &run.label);
        let text = format!(
            "{first} and {other} read different numbers of events of the same sessions \
             (`data.max_length`); segments by kind of target, support and session length are \
             those of {first}"
        );
        warnings.push(text);
    }
    warnings
}

fn summary(run: &FinishedRun) -> RunSummary {
    RunSummary {
        label: run.label.clone(),
        title: run.title.clone(),
        kind: run.kind.clone(),
        is_baseline: run.is_baseline(),
        path: run.path.clone(),
        machine: run.machine.clone(),
        config: run.config.clone(),
        days: run.days.clone(),
        learning_curve: learning_curve(&run.steps),
    }
}

/// Losses by step of the whole run. The last step of every day is recorded, so the recorded step
/// numbers give the length of each day.
fn learning_curve(steps: &[LoggedStep]) -> Vec<CurvePoint> {
    let (mut points, mut before, mut last) = (Vec::new(), 0, None::<LoggedStep>);
    for &step in steps {
        before += last.filter(|last| last.day != step.day).map_or(0, |last| last.step);
        points.push(CurvePoint { step: (before + step.step) as f64, loss: step.loss });
        last = Some(step);
    }
    let mean = |points: &[CurvePoint], of: fn(&CurvePoint) -> f64| {
        points.iter().map(of).sum::<f64>() / points.len() as f64
    };
    points
        .chunks(points.len().div_ceil(MAX_CURVE_POINTS).max(1))
        .map(|chunk| CurvePoint {
            step: mean(chunk, |point| point.step),
            loss: mean(chunk, |point| point.loss),
        })
        .collect()
}

fn evaluated_part(runs: &[FinishedRun], part: usize, n_resamples: u32) -> EvaluatedPart {
    let (facts, outcomes) = &runs[0].evaluations[part];
    let by_run = runs.iter().map(|run| {
        let (facts, outcomes) = &run.evaluations[part];
        EvaluatedRun {
            label: run.label.clone(),
            loss: facts.loss,
            coverage_at_20: facts.coverage_at_20,
            estimates: Estimates::of(outcomes.iter().map(|outcome| outcome.rank), n_resamples),
        }
    });
    EvaluatedPart {
        train_day: facts.train_day,
        eval_day: facts.eval_day,
        split: facts.split.clone(),
        n_sessions: outcomes.len(),
        runs: by_run.collect(),
    }
}

fn differences(
    runs: &[FinishedRun],
    last: &EvaluatedPart,
    n_resamples: u32,
) -> Option<Differences> {
    let ndcg = |run: usize| last.runs[run].estimates.get(Measure::NdcgAt20).value;
    let baselines = (0..runs.len()).filter(|&run| runs[run].is_baseline());
    // `max_by` returns the last maximum: reversed, the first of equals.
    let reference = baselines.rev().max_by(|&a, &b| ndcg(a).total_cmp(&ndcg(b))).unwrap_or(0);
    let segments = compared_segments(last_outcomes(&runs[0]));
    let others = (0..runs.len()).filter(|&run| run != reference);
    let difference = |run: usize| difference(&runs[run], &runs[reference], &segments, n_resamples);
    let by_run: Vec<Difference> = others.map(difference).collect();
    (!by_run.is_empty())
        .then(|| Differences { reference: runs[reference].label.clone(), runs: by_run })
}

fn difference(
    run: &FinishedRun,
    reference: &FinishedRun,
    segments: &[Segment],
    n_resamples: u32,
) -> Difference {
    let pairs = last_outcomes(run).iter().zip(last_outcomes(reference));
    let ranks: Vec<(i64, i64)> = pairs.map(|(run, reference)| (run.rank, reference.rank)).collect();
    let in_segment = |segment: &Segment| {
        let ranks = segment.rows.iter().map(|&row| ranks[row]);
        SegmentDifference {
            by: segment.by,
            label: segment.label.clone(),
            n_sessions: segment.rows.len(),
            ndcg_at_20: Estimates::of_difference(ranks, n_resamples).get(Measure::NdcgAt20),
        }
    };
    let segments: Vec<SegmentDifference> = segments.iter().map(in_segment).collect();
    Difference {
        label: run.label.clone(),
        estimates: Estimates::of_difference(ranks.iter().copied(), n_resamples),
        summary: summary_of_lower(&run.label, &reference.label, &segments),
        segments,
    }
}

/// Lists in words the segments in which a run has a lower NDCG@20 than the reference.
fn summary_of_lower(run: &str, reference: &str, segments: &[SegmentDifference]) -> String {
    if segments.is_empty() {
        return format!("{run} and {reference} cannot be compared: there are no sessions.");
    }
    let lower: Vec<&SegmentDifference> =
        segments.iter().filter(|segment| segment.ndcg_at_20.value < 0.0).collect();
    let of_all = format!("of {} segments", segments.len());
    if lower.is_empty() {
        return format!("{run} has a lower NDCG@20 than {reference} in none {of_all}.");
    }
    let text = |segment: &&SegmentDifference| {
        let SegmentDifference { by, label, n_sessions, ndcg_at_20 } = segment;
        let sessions = if *n_sessions == 1 { "session" } else { "sessions" };
        format!("{} {label} ({n_sessions} {sessions}, {ndcg_at_20:+})", by.name())
    };
    format!(
        "{run} has a lower NDCG@20 than {reference} in {} {of_all}: {}. The interval of the \
         difference lies below 0 in {} of them.",
        lower.len(),
        lower.iter().map(text).collect::<Vec<_>>().join(", "),
        lower.iter().filter(|segment| segment.ndcg_at_20.high < 0.0).count()
    )
}

/// Metrics of all runs in each segment.
fn groups(runs: &[FinishedRun], segments: &[Segment], n_resamples: u32) -> Vec<SessionGroup> {
    let estimates = |run: &FinishedRun, segment: &Segment| {
        let outcomes = last_outcomes(run);
        Estimates::of(segment.rows.iter().map(|&row| outcomes[row].rank), n_resamples)
    };
    let group = |segment: &Segment| SessionGroup {
        label: segment.label.clone(),
        n_sessions: segment.rows.len(),
        runs: runs.iter().map(|run| estimates(run, segment)).collect(),
    };
    segments.iter().map(group).collect()
}
