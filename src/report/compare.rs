//! Runs beside each other: figures with intervals, differences, and figures by kind of session.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Serialize, Serializer};

use super::bootstrap::{CONFIDENCE, Estimate, bootstrap};
use super::evaluations::Facts;
use super::runs::{Run, Step, TrainedDay};
use crate::data::Split;
use crate::metrics::{K_MAX, Measure, Outcome, Tally, rank_bin};

/// Points of a learning curve at most; of more steps neighbours are averaged.
const MAX_CURVE_POINTS: usize = 400;

/// Events known of a session, from and to, by which sessions are grouped.
const LENGTHS: [(i64, i64); 6] = [(1, 1), (2, 2), (3, 3), (4, 5), (6, 10), (11, i64::MAX)];

/// An estimate of each [`Measure`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures([Estimate; 5]);

impl Figures {
    /// That of one measure.
    pub fn get(&self, measure: Measure) -> Estimate {
        self.0[measure as usize]
    }

    /// Of sessions whose items had these ranks.
    fn of(ranks: impl Iterator<Item = i64>, n_resamples: u32) -> Self {
        let mut at_rank = [0; K_MAX + 1];
        ranks.for_each(|rank| at_rank[rank_bin(rank)] += 1);
        Self(bootstrap(&at_rank, n_resamples, figures))
    }

    /// Of the differences between two runs on the same sessions, which are resampled in pairs.
    fn of_difference(ranks: impl Iterator<Item = (i64, i64)>, n_resamples: u32) -> Self {
        let mut at_ranks: BTreeMap<(usize, usize), i64> = BTreeMap::new();
        ranks.for_each(|(a, b)| *at_ranks.entry((rank_bin(a), rank_bin(b))).or_default() += 1);
        let counts: Vec<i64> = at_ranks.values().copied().collect();
        Self(bootstrap(&counts, n_resamples, |counts| {
            let (mut of_a, mut of_b) = ([0; K_MAX + 1], [0; K_MAX + 1]);
            for (&(a, b), n) in at_ranks.keys().zip(counts) {
                of_a[a] += n;
                of_b[b] += n;
            }
            let (of_a, of_b) = (figures(&of_a), figures(&of_b));
            std::array::from_fn(|measure| of_a[measure] - of_b[measure])
        }))
    }
}

/// Every measure of sessions counted by rank.
fn figures(at_rank: &[i64]) -> [f64; 5] {
    let metrics = Tally::of_counts(at_rank.try_into().expect("a count for each rank")).metrics(false);
    Measure::ALL.map(|measure| measure.of(&metrics))
}

impl Serialize for Figures {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Measure::ALL.map(|measure| (measure.key(), self.get(measure))))
    }
}

/// Runs beside each other. Wherever figures are listed by run, they come in the order of [`Comparison::runs`].
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// Layout of `report.json`.
    pub format: u32,
    /// Version of the program.
    pub bireme: &'static str,
    /// Resamples behind each interval.
    pub n_resamples: u32,
    /// Share of the resamples that an interval spans.
    pub confidence: f64,
    /// What a reader has to know first.
    pub warnings: Vec<String>,
    /// The runs, in the order given.
    pub runs: Vec<RunSummary>,
    /// What all of them evaluated, in order of time; the last is the one that later tables are about.
    pub evaluations: Vec<EvaluatedPart>,
    /// On the last evaluation, against the reference; none when there is but one run.
    pub differences: Option<Differences>,
    /// The last evaluation by the number of events that were known of a session.
    pub by_known_events: Vec<Group>,
    /// The last evaluation by the popularity decile of the held-out item.
    pub by_popularity_decile: Vec<Group>,
}

impl Comparison {
    /// The evaluation that counts: of the latest day, and there of test rather than valid.
    pub fn last(&self) -> &EvaluatedPart {
        self.evaluations.last().expect("every run evaluated at least one day")
    }
}

/// One run.
#[derive(Clone, Debug, Serialize)]
pub struct RunSummary {
    /// What it is called here.
    pub label: String,
    /// The model's name.
    pub title: String,
    /// `model.kind`.
    pub kind: String,
    /// Whether its model only counts.
    pub is_baseline: bool,
    /// Its directory.
    pub path: PathBuf,
    /// Its `run.json`.
    pub machine: serde_json::Value,
    /// Its configuration, in TOML.
    pub config: String,
    /// What training took.
    pub days: Vec<TrainedDay>,
    /// Training loss by step.
    pub learning_curve: Vec<CurvePoint>,
}

/// A point of a learning curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CurvePoint {
    /// Steps since the run began.
    pub step: f64,
    /// Mean loss of a target.
    pub loss: f64,
}

/// One part of one day, evaluated by all runs.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluatedPart {
    /// The day trained on last.
    pub train_day: i64,
    /// The day evaluated on.
    pub eval_day: i64,
    /// Which of its parts.
    pub split: Split,
    /// Sessions evaluated.
    pub n_sessions: usize,
    /// By run.
    pub runs: Vec<EvaluatedRun>,
}

/// What one run made of it.
#[derive(Clone, Debug, Serialize)]
pub struct EvaluatedRun {
    /// The run's label.
    pub label: String,
    /// Cross entropy of the held-out item, for models whose scores are logits.
    pub loss: Option<f64>,
    /// Share of the items that may be recommended that are in the top 20 of at least one session.
    pub coverage_at_20: Option<f64>,
    /// Everything else.
    #[serde(flatten)]
    pub figures: Figures,
}

/// Each run minus the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Differences {
    /// The baseline with the highest NDCG@20, or the first run where there is no baseline.
    pub reference: String,
    /// By run, without the reference.
    pub runs: Vec<Difference>,
}

/// One run minus the reference.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// The run's label.
    pub label: String,
    /// The differences.
    #[serde(flatten)]
    pub figures: Figures,
}

/// Sessions of one kind.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    /// Which.
    pub label: String,
    /// How many.
    pub n_sessions: usize,
    /// By run.
    pub runs: Vec<Figures>,
}

/// Runs that cannot be compared.
#[derive(Debug, thiserror::Error)]
#[error("runs `{}` and `{}` cannot be compared{}: {problem}", a.display(), b.display(), on.as_deref().unwrap_or_default())]
pub struct CompareError {
    a: PathBuf,
    b: PathBuf,
    /// ` on day 3 (valid)`.
    on: Option<String>,
    problem: String,
}

/// Compares runs that evaluated the same sessions.
///
/// # Errors
/// They did not, or not after the same days of training.
pub fn compare(runs: &[Run], n_resamples: u32) -> Result<Comparison, CompareError> {
    let (first, others) = runs.split_first().expect("at least one run");
    for other in others {
        check_same_sessions(first, other)?;
    }
    let parts = 0..first.evaluations.len();
    let evaluations: Vec<EvaluatedPart> = parts.map(|part| evaluated_part(runs, part, n_resamples)).collect();
    let last = evaluations.last().expect("every run evaluated at least one day");
    let outcomes: Vec<&[Outcome]> = runs.iter().map(last_outcomes).collect();
    let by_known_events = LENGTHS.map(|(from, to)| {
        let label = match to {
            _ if from == to => from.to_string(),
            i64::MAX => format!("{from} or more"),
            _ => format!("{from} to {to}"),
        };
        (label, move |outcome: &Outcome| (from..=to).contains(&outcome.n_known))
    });
    let by_decile = (1..=10).chain([0]).map(|decile| {
        let label = if decile == 0 { "never seen".to_owned() } else { decile.to_string() };
        (label, move |outcome: &Outcome| outcome.decile == decile)
    });
    Ok(Comparison {
        format: 1,
        bireme: env!("CARGO_PKG_VERSION"),
        n_resamples,
        confidence: CONFIDENCE,
        warnings: warnings(runs),
        differences: differences(runs, last, n_resamples),
        by_known_events: groups(&outcomes, by_known_events, n_resamples),
        by_popularity_decile: groups(&outcomes, by_decile, n_resamples),
        runs: runs.iter().map(summary).collect(),
        evaluations,
    })
}

fn last_outcomes(run: &Run) -> &[Outcome] {
    &run.evaluations.last().expect("every run evaluated at least one day").1
}

fn check_same_sessions(a: &Run, b: &Run) -> Result<(), CompareError> {
    let refuse = |on: Option<&Facts>, problem: String| {
        let on = on.map(|facts| format!(" on {}", name(facts)));
        Err(CompareError { a: a.path.clone(), b: b.path.clone(), on, problem })
    };
    for (one, other) in [(a, b), (b, a)] {
        let has = |facts: &Facts| other.evaluations.iter().any(|(theirs, _)| part(theirs) == part(facts));
        if let Some((facts, _)) = one.evaluations.iter().find(|(facts, _)| !has(facts)) {
            return refuse(None, format!("only `{}` evaluated {}", one.path.display(), name(facts)));
        }
    }
    for ((facts_a, of_a), (facts_b, of_b)) in a.evaluations.iter().zip(&b.evaluations) {
        let (days_a, days_b) = (facts_a.train_day, facts_b.train_day);
        if days_a != days_b {
            return refuse(
                Some(facts_a),
                format!("the one was trained to day {days_a}, the other to day {days_b}"),
            );
        }
        if of_a.len() != of_b.len() {
            let problem = format!("the one has {} sessions, the other {}", of_a.len(), of_b.len());
            return refuse(Some(facts_a), problem);
        }
        if let Some(row) = of_a.iter().zip(of_b).position(|(a, b)| a.target != b.target) {
            let (a, b) = (of_a[row].target, of_b[row].target);
            let problem =
                format!("the held-out item of session {row} is {a} in the one and {b} in the other");
            return refuse(Some(facts_a), problem);
        }
    }
    Ok(())
}

fn part(facts: &Facts) -> (i64, Split) {
    (facts.eval_day, facts.split)
}

fn name(facts: &Facts) -> String {
    format!("day {} ({})", facts.eval_day, facts.split.name())
}

fn warnings(runs: &[Run]) -> Vec<String> {
    let mut warnings = Vec::new();
    if !runs.iter().any(Run::is_baseline) {
        let text = "no baseline was given: figures say little before they are compared with those of a model that \
                    only counts (`model.kind` popularity, markov and the like)";
        warnings.push(text.to_owned());
    }
    let known = |run| last_outcomes(run).iter().map(|outcome| outcome.n_known);
    if let Some(run) = runs.iter().find(|run| !known(run).eq(known(&runs[0]))) {
        let (first, other) = (&runs[0].label, &run.label);
        let text = format!(
            "{first} and {other} knew different numbers of events of the same sessions (`data.max_length`); sessions \
             are grouped as {first} saw them"
        );
        warnings.push(text);
    }
    warnings
}

fn summary(run: &Run) -> RunSummary {
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

/// Losses by step of the whole run. The last step of every day is recorded, so that days can be laid end to end.
fn learning_curve(steps: &[Step]) -> Vec<CurvePoint> {
    let (mut points, mut before, mut last) = (Vec::new(), 0, None::<Step>);
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

fn evaluated_part(runs: &[Run], part: usize, n_resamples: u32) -> EvaluatedPart {
    let (facts, outcomes) = &runs[0].evaluations[part];
    let by_run = runs.iter().map(|run| {
        let (facts, outcomes) = &run.evaluations[part];
        EvaluatedRun {
            label: run.label.clone(),
            loss: facts.loss,
            coverage_at_20: facts.coverage_at_20,
            figures: Figures::of(outcomes.iter().map(|outcome| outcome.rank), n_resamples),
        }
    });
    EvaluatedPart {
        train_day: facts.train_day,
        eval_day: facts.eval_day,
        split: facts.split,
        n_sessions: outcomes.len(),
        runs: by_run.collect(),
    }
}

fn differences(runs: &[Run], last: &EvaluatedPart, n_resamples: u32) -> Option<Differences> {
    let ndcg = |run: usize| last.runs[run].figures.get(Measure::NdcgAt20).value;
    let baselines = (0..runs.len()).filter(|&run| runs[run].is_baseline());
    // Of equals the first.
    let reference = baselines.rev().max_by(|&a, &b| ndcg(a).total_cmp(&ndcg(b))).unwrap_or(0);
    let ranks = |run: &Run| last_outcomes(run).iter().map(|outcome| outcome.rank).collect::<Vec<i64>>();
    let of_reference = ranks(&runs[reference]);
    let others = runs.iter().enumerate().filter(|(run, _)| *run != reference);
    let by_run: Vec<Difference> = others
        .map(|(_, run)| {
            let pairs = ranks(run).into_iter().zip(of_reference.iter().copied());
            Difference { label: run.label.clone(), figures: Figures::of_difference(pairs, n_resamples) }
        })
        .collect();
    (!by_run.is_empty()).then(|| Differences { reference: runs[reference].label.clone(), runs: by_run })
}

/// The groups that have sessions. Which session is in which is what the first run says.
fn groups<F: Fn(&Outcome) -> bool>(
    outcomes: &[&[Outcome]],
    kinds: impl IntoIterator<Item = (String, F)>,
    n_resamples: u32,
) -> Vec<Group> {
    let groups = kinds.into_iter().filter_map(|(label, belongs)| {
        let rows: Vec<usize> = (0..outcomes[0].len()).filter(|&row| belongs(&outcomes[0][row])).collect();
        let by_run = outcomes
            .iter()
            .map(|outcomes| Figures::of(rows.iter().map(|&row| outcomes[row].rank), n_resamples));
        (!rows.is_empty()).then(|| Group { label, n_sessions: rows.len(), runs: by_run.collect() })
    });
    groups.collect()
}
