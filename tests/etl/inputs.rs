//! Files that are given twice are refused, and events far from all others are named.

use std::fs;
use std::os::unix::fs::symlink;

use bireme_base::user_error::UserError;
use bireme_etl::{BadRows, Error, PreprocessOptions, first_events, preprocess};

use crate::support::{HEADER, run, scratch};

const ROWS: &str =
    "2019-10-01 10:00:00 UTC,view,11,7,,,1,1,s\n2019-10-01 10:00:05 UTC,view,22,7,,,1,1,s\n";

#[test]
fn a_file_that_is_given_twice_is_refused() {
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    fs::write(path("x.csv"), format!("{HEADER}\n{ROWS}")).unwrap();
    fs::write(path("y.csv"), format!("{HEADER}\n{}", ROWS.replace(",s", ",t"))).unwrap();
    fs::hard_link(path("x.csv"), path("hard.csv")).unwrap();
    symlink("x.csv", path("soft.csv")).unwrap();
    symlink(".", path("here")).unwrap();
    for again in ["x.csv", "./x.csv", "hard.csv", "soft.csv", "here/x.csv"] {
        let files = ["x.csv", "y.csv", again].map(path).to_vec();
        let refused = preprocess(&PreprocessOptions::new(files.clone(), path("out")), &mut |_| {})
            .unwrap_err();
        assert!(
            matches!(refused, Error::SameInput { .. }) && refused.exit_code() == 2,
            "{refused}"
        );
        assert!(refused.to_string().contains(&path(again).display().to_string()), "{refused}");
        let refused = first_events(&files, 10, BadRows::Refuse).unwrap_err();
        assert!(matches!(refused, Error::SameInput { .. }), "{refused}");
    }
    assert!(!path("out").exists());
    let twice = vec!["-".into(), "-".into()];
    let refused = preprocess(&PreprocessOptions::new(twice, path("out")), &mut |_| {}).unwrap_err();
    assert!(matches!(refused, Error::SameInput { .. }), "{refused}");
}

fn warnings(csv: &str, change: impl FnOnce(&mut PreprocessOptions)) -> Vec<String> {
    let dir = scratch();
    let events = dir.path().join("events.csv");
    fs::write(&events, csv).unwrap();
    let mut options = PreprocessOptions::new(vec![events], dir.path().join("out"));
    change(&mut options);
    let mut warnings = Vec::new();
    preprocess(&options, &mut |line| {
        if let Some(warning) = line.strip_prefix("warning: ") {
            warnings.push(warning.replace(&dir.path().display().to_string(), "DIR"));
        }
    })
    .unwrap();
    warnings
}

#[test]
fn few_events_far_from_all_others_are_named() {
    let usual: String = (1..9)
        .map(|day| ROWS.replace("-01 ", &format!("-{day:02} ")).replace(",s", &format!(",s{day}")))
        .collect();
    assert_eq!(warnings(&format!("{HEADER}\n{usual}"), |_| {}), [""; 0]);
    for (time, expected) in [
        (
            "1970-01-01 00:00:00",
            "18170 days before all others: `day_index` counts from there, and the others begin at \
             18171",
        ),
        ("0001-01-01 00:00:00", "days before all others"),
        ("9999-12-31 23:59:59", "days after all others: its `day_index` is 2914"),
        ("2021-10-01 00:00:00", "days after all others: its `day_index` is 731"),
    ] {
        // After a row without a session, which counts as a row too.
        let csv = format!(
            "{HEADER}\n{ROWS}{}{time} UTC,view,1,7,,,1,1,bot\n{usual}",
            ROWS.replace(",s", ",")
        );
        let warnings = warnings(&csv, |_| {});
        assert!(
            matches!(&warnings[..], [warning] if warning.contains(expected)),
            "{time}: {warnings:?}"
        );
        let place = warnings[0].split(':').next().unwrap();
        assert!(
            ["`DIR/events.csv`, line 6", "`DIR/events.csv`, row 5"].contains(&place),
            "{place}"
        );
    }
}

#[test]
fn an_extension_is_compared_with_what_it_extends() {
    let dir = scratch();
    run(dir.path(), &format!("{HEADER}\n{ROWS}"), |_| {}).unwrap();
    let early = ROWS.replace("2019", "1999").replace(",s", ",early");
    let next = ROWS.replace("10-01", "10-02").replace(",s", ",t");
    let events = dir.path().join("events.csv");
    fs::write(&events, format!("{HEADER}\n{early}{next}")).unwrap();
    let mut options = PreprocessOptions::new(vec![events], dir.path().join("out"));
    options.extend = true;
    preprocess(&options, &mut |line| assert!(!line.contains("warning"), "{line}")).unwrap();
}

#[test]
fn sessions_of_one_event_are_warned_of() {
    let csv = format!("{HEADER}\n{ROWS}");
    let warned = warnings(&csv, |options| options.settings.min_length = 1);
    assert!(
        matches!(&warned[..], [warning] if warning.contains("sessions of one event")),
        "{warned:?}"
    );
}
