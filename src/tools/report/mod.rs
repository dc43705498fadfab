//! `bireme report`: finished runs, side by side.
//!
//! Run directories → [`runs`] → [`compare`] (metrics with intervals by [`bootstrap`], of all
//! sessions and of [`segments`]) → `charts`, `tables` and `pages` → a folder, written by
//! [`write()`].

pub mod evaluation_file;
pub mod runs;
pub mod bootstrap;
pub mod segments;
pub mod compare;
pub mod plot;
mod charts;
mod tables;
mod pages;
mod write;

pub use write::{PAGE, WriteError, create, write};

/// Text of `results.txt`: NDCG@10, NDCG@20, Recall@10 and Recall@20 below a title.
pub fn results_text(title: &str, [ndcg_10, ndcg_20, recall_10, recall_20]: [f64; 4]) -> String {
    format!(
        "{title} accuracy results:\n\
         next-item/ndcg_at_10:{ndcg_10}\nnext-item/ndcg_at_20:{ndcg_20}\n\
         next-item/recall_at_10:{recall_10}\nnext-item/recall_at_20:{recall_20}\n"
    )
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::{Path, PathBuf};

    use super::compare::{Comparison, SessionGroup, compare};
    use super::evaluation_file::{self, EvaluationFacts, SessionOutcome};
    use super::segments::{SegmentBy, compared_segments};
    use super::{create, runs, write};

    /// Known events, repeats, support and decile of the target of each session.
    const SESSIONS: [[i64; 4]; 6] =
        [[1, 0, 0, 0], [1, 0, 1, 9], [2, 0, 3, 8], [3, 1, 60, 1], [12, 2, 0, 0], [2, 0, 51, 1]];

    fn outcomes(ranks: [i64; 6]) -> Vec<SessionOutcome> {
        let sessions = ranks.into_iter().zip(SESSIONS).zip(2..);
        sessions
            .map(|((rank, [n_known, n_repeats, support, decile]), target)| SessionOutcome {
                rank,
                n_known,
                target,
                decile,
                n_repeats,
                support,
            })
            .collect()
    }

    /// Writes the directory of a run that evaluated day 2.
    fn write_run(run: &Path, kind: &str, outcomes: &[SessionOutcome]) -> PathBuf {
        fs::create_dir_all(run.join("evaluations")).unwrap();
        let config = format!("[data]\nfirst_day = 1\nlast_day = 2\n[model]\nkind = \"{kind}\"\n");
        for (name, text) in [
            ("config.toml", config.as_str()),
            ("results.txt", ""),
            ("metrics.jsonl", ""),
            ("run.json", "{}"),
        ] {
            fs::write(run.join(name), text).unwrap();
        }
        let facts = EvaluationFacts {
            format: evaluation_file::FORMAT,
            title: kind.to_owned(),
            train_day: 1,
            eval_day: 2,
            split: "valid".to_owned(),
            loss: None,
            coverage_at_20: None,
        };
        let file = File::create(evaluation_file::path(run, 2, "valid")).unwrap();
        evaluation_file::write(file, &facts, outcomes).unwrap();
        run.to_owned()
    }

    fn sizes(groups: &[SessionGroup]) -> Vec<(&str, usize)> {
        groups.iter().map(|group| (group.label.as_str(), group.n_sessions)).collect()
    }

    /// A baseline and two models, the second of which has no lower NDCG@20 in any segment.
    fn compare_in(dir: &Path) -> (Vec<PathBuf>, Comparison) {
        let ranks = [
            ("markov", [100, 3, 1, 1, 1, 2]),
            ("gru", [100, 1, 2, 3, 1, 1]),
            ("xlnet", [100, 1, 1, 1, 1, 1]),
        ];
        let paths = ranks.map(|(kind, ranks)| write_run(&dir.join(kind), kind, &outcomes(ranks)));
        let comparison = compare(&runs::read(&paths).unwrap(), 1000).unwrap();
        (paths.into(), comparison)
    }

    #[test]
    fn sessions_are_split_by_their_target() {
        let dir = tempfile::tempdir().unwrap();
        let (_, comparison) = compare_in(dir.path());
        assert_eq!(
            sizes(&comparison.by_target_kind),
            [("repeat", 2), ("seen", 3), ("never seen", 1)]
        );
        // Neither the repeat of support 60 nor the one of support 0 is a session of these.
        assert_eq!(
            sizes(&comparison.by_target_support),
            [("0", 1), ("1", 1), ("2 to 3", 1), ("51 or more", 1)]
        );
        assert_eq!(
            sizes(&comparison.by_known_events),
            [("1", 2), ("2", 2), ("3", 1), ("11 or more", 1)]
        );
        assert_eq!(
            sizes(&comparison.by_popularity_decile),
            [("1", 2), ("8", 1), ("9", 1), ("never seen", 2)]
        );
        let kinds = SegmentBy::TargetKind.segments(&outcomes([1; 6]));
        let rows: Vec<&[usize]> = kinds.iter().map(|segment| &segment.rows[..]).collect();
        assert_eq!(rows, [&[3, 4][..], &[1, 2, 5], &[0]]);
    }

    #[test]
    fn every_support_is_in_one_range() {
        let of_support = |support: i64| {
            let outcome = SessionOutcome { support, ..outcomes([1; 6])[1] };
            let segments = SegmentBy::TargetSupport.segments(&[outcome]);
            segments.iter().map(|segment| segment.label.clone()).collect::<Vec<_>>()
        };
        let expected = [
            (0, "0"),
            (1, "1"),
            (2, "2 to 3"),
            (3, "2 to 3"),
            (4, "4 to 10"),
            (10, "4 to 10"),
            (11, "11 to 50"),
            (50, "11 to 50"),
            (51, "51 or more"),
            (1_000_000, "51 or more"),
        ];
        for (support, label) in expected {
            assert_eq!(of_support(support), [label]);
        }
    }

    #[test]
    fn a_run_is_compared_in_each_segment_once() {
        let all = outcomes([1; 6]);
        let segments: Vec<String> = compared_segments(&all)
            .iter()
            .map(|segment| format!("{} {}", segment.by.name(), segment.label))
            .collect();
        let expected = [
            "kind of target repeat",
            "kind of target seen",
            "kind of target never seen",
            "support of the target 1",
            "support of the target 2 to 3",
            "support of the target 51 or more",
            "known events 1",
            "known events 2",
            "known events 3",
            "known events 11 or more",
        ];
        assert_eq!(segments, expected);
    }

    #[test]
    fn a_report_lists_the_segments_with_a_lower_ndcg() {
        let dir = tempfile::tempdir().unwrap();
        let (paths, comparison) = compare_in(dir.path());
        let differences = comparison.differences.as_ref().unwrap();
        assert_eq!(differences.reference, "markov");
        let summaries: Vec<&str> =
            differences.runs.iter().map(|run| run.summary.as_str()).collect();
        // With the ranks 1 and 2 in the place of 2 and 1, the mean over 2 known events is the same.
        let expected = [
            "gru has a lower NDCG@20 than markov in 3 of 10 segments: kind of target repeat (2 \
             sessions, -0.2500 [-0.5000, +0.0000]), support of the target 2 to 3 (1 session, \
             -0.3691 [-0.3691, -0.3691]), known events 3 (1 session, -0.5000 [-0.5000, -0.5000]). \
             The interval of the difference lies below 0 in 2 of them.",
            "xlnet has a lower NDCG@20 than markov in none of 10 segments.",
        ];
        assert_eq!(summaries, expected);

        let out = dir.path().join("report");
        write(create(&out, &paths, false, &mut |_| ()).unwrap(), &comparison).unwrap();
        let text = |name: &str| fs::read_to_string(out.join(name)).unwrap();
        let (page, markdown) = (text("index.html"), text("report.md"));
        for summary in expected {
            assert!(page.contains(&format!("<li>{summary}</li>")), "{page}");
            let escaped = crate::table::markdown_text(summary);
            assert!(markdown.contains(&format!("\n- {escaped}\n")), "{markdown}");
        }
        for caption in ["NDCG@20 by kind of target", "NDCG@20 by support (occurrences in training)"]
        {
            assert!(page.contains(caption) && markdown.contains(caption), "{caption}");
        }
        let figures: serde_json::Value = serde_json::from_str(&text("report.json")).unwrap();
        let gru = &figures["differences"]["runs"][0];
        assert_eq!(gru["summary"], expected[0]);
        assert_eq!(gru["segments"].as_array().unwrap().len(), 10);
        let repeat = &gru["segments"][0];
        assert_eq!(
            (&repeat["by"], &repeat["label"], &repeat["n_sessions"]),
            (&"target_kind".into(), &"repeat".into(), &2.into())
        );
        assert_eq!(repeat["ndcg_at_20"]["value"], -0.25);
        assert_eq!(figures["by_target_support"][2]["label"], "2 to 3");
    }

    #[test]
    fn runs_without_sessions_are_not_compared() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["gru", "markov"].map(|kind| write_run(&dir.path().join(kind), kind, &[]));
        let comparison = compare(&runs::read(&paths).unwrap(), 100).unwrap();
        assert!(comparison.by_target_kind.is_empty() && comparison.by_target_support.is_empty());
        let out = dir.path().join("report");
        write(create(&out, &paths, false, &mut |_| ()).unwrap(), &comparison).unwrap();
        let summary = &comparison.differences.unwrap().runs[0].summary;
        assert_eq!(summary, "gru and markov cannot be compared: there are no sessions.");
    }
}
