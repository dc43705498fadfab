//! `--extend` adds later days to a fitted workflow: existing ids and statistics stay, and new
//! values get the next ids.

use std::collections::BTreeMap;
use std::path::Path;

use bireme_etl::{Coded, Error, WORKFLOW, Workflow};

use crate::support::{HEADER, bytes, days, rows, run, scratch, shop};

/// The rows of sessions that begin in the first six days, and those of the others.
fn split(csv: &str) -> [String; 2] {
    let lines = || csv.lines().skip(1);
    let session = |line: &str| line.rsplit(',').next().unwrap().to_owned();
    let mut begun: BTreeMap<String, &str> = BTreeMap::new();
    for line in lines() {
        let first = begun.entry(session(line)).or_insert(line);
        *first = (*first).min(line);
    }
    // Days are counted from the first event of a session on.
    let first = begun
        .iter()
        .filter(|(session, _)| !session.is_empty())
        .map(|(_, line)| *line)
        .min()
        .unwrap();
    let end = format!("2019-10-07{}", &first[10..19]);
    let of = |is_early: bool| {
        let rows = lines().filter(|line| (begun[&session(line)] < end.as_str()) == is_early);
        rows.fold(format!("{HEADER}\n"), |text, line| text + line + "\n")
    };
    [of(true), of(false)]
}

fn workflow(dir: &Path) -> Workflow {
    Workflow::load(&dir.join("out").join(WORKFLOW)).unwrap()
}

#[test]
fn ids_and_statistics_stay_and_new_values_follow() {
    let csv = shop(300);
    let [early, late] = split(&csv);
    let (dir, whole) = (scratch(), scratch());
    run(dir.path(), &early, |_| {}).unwrap();
    let (before, fitted) = (bytes(&dir.path().join("out")), workflow(dir.path()));
    assert_eq!(days(&dir.path().join("out")), [1, 2, 3, 4, 5, 6]);

    let report = run(dir.path(), &late, |options| options.extend = true).unwrap();
    let out = dir.path().join("out");
    assert_eq!((days(&out), report.n_held), ((1..=10).collect(), 0));
    let after = bytes(&out);
    for (path, bytes) in before.iter().filter(|(path, _)| path.starts_with("sessions_by_day")) {
        assert!(&after[path] == bytes, "{}", path.display());
    }
    let extended = workflow(dir.path());
    for column in Coded::ALL {
        let (old, new) = (fitted.vocabulary(column), extended.vocabulary(column));
        for id in 0..old.cardinality() as u32 {
            assert_eq!(old.value(id), new.value(id), "{column:?}");
            assert!(old.count(id) <= new.count(id), "{column:?}");
        }
        // New values by descending count, then by value.
        let added: Vec<_> = (old.cardinality() as u32..new.cardinality() as u32)
            .map(|id| (std::cmp::Reverse(new.count(id).unwrap()), new.value(id).unwrap()))
            .collect();
        assert!(added.is_sorted(), "{column:?}");
        let grows = [Coded::Product, Coded::User, Coded::Session].contains(&column);
        assert_eq!(!added.is_empty(), grows, "{column:?}");
    }
    let (old, new) = (&fitted.statistics, &extended.statistics);
    assert_eq!(
        (old.price_log, old.recency_log, old.first_event),
        (new.price_log, new.recency_log, new.first_event)
    );
    let product = (1000..1900).find(|&product| fitted.product(product).is_some()).unwrap();
    assert_eq!(fitted.first_seen(product), extended.first_seen(product));

    // The sessions of the new days are those of one run over everything.
    run(whole.path(), &csv, |_| {}).unwrap();
    let later = |out: &Path| -> Vec<_> {
        let rows = rows(out).into_iter().filter(|row| row.day_index > 6);
        let mut rows: Vec<_> = rows
            .map(|row| (row.day_index, row.split.name(), row.session, row.count, row.products))
            .collect();
        rows.sort();
        rows
    };
    assert!(later(&out).len() > 50);
    assert_eq!(later(&out), later(&whole.path().join("out")));
    assert_eq!(new.n_events, workflow(whole.path()).statistics.n_events);
}

#[test]
fn sessions_that_are_there_are_left_out_and_nothing_new_is_refused() {
    let csv = shop(200);
    let [early, late] = split(&csv);
    let (dir, other) = (scratch(), scratch());
    for dir in [&dir, &other] {
        run(dir.path(), &early, |_| {}).unwrap();
    }
    run(dir.path(), &late, |options| options.extend = true).unwrap();
    let report = run(other.path(), &csv, |options| options.extend = true).unwrap();
    assert!(report.n_held > 50 && report.n_late == 0, "{report}");
    let (a, b) = (bytes(&dir.path().join("out")), bytes(&other.path().join("out")));
    assert!(a.keys().eq(b.keys()));
    for (path, bytes) in &a {
        assert!(bytes == &b[path], "{}", path.display());
    }

    let error = run(dir.path(), &csv, |options| options.extend = true).unwrap_err();
    assert!(
        matches!(&error, Error::Nothing(text) if text.contains("begins after day 10")),
        "{error}"
    );
    assert!(bytes(&dir.path().join("out")) == a);
    // A session of an existing day that the folder lacks is reported, not added.
    let late = "2019-10-02 10:00:00 UTC,view,1001,1,,,1.5,1,late\n\
                2019-10-02 10:00:01 UTC,view,1002,1,,,1.5,1,late\n";
    let fresh = scratch();
    run(fresh.path(), &early, |_| {}).unwrap();
    let [_, after] = split(&csv);
    let report = run(fresh.path(), &(after + late), |options| options.extend = true).unwrap();
    assert_eq!((report.n_held, report.n_late), (1, 1), "{report}");
    let nowhere = scratch();
    let error = run(nowhere.path(), &csv, |options| options.extend = true).unwrap_err();
    assert!(error.to_string().contains("statistics.json"), "{error}");
}

#[test]
fn session_ids_that_were_numbers_throughout_need_not_stay_so() {
    let event = |day: u32, session: &str| {
        let row = |second: u32, product: u32| {
            format!("2019-10-{day:02} 10:00:{second:02} UTC,view,{product},1,,,1.5,1,{session}\n")
        };
        row(0, 1) + &row(1, day + 1)
    };
    let dir = scratch();
    run(dir.path(), &format!("{HEADER}\n{}{}", event(1, "7"), event(2, "8")), |_| {}).unwrap();
    for (day, session) in [(3, "9"), (4, "x"), (5, "10")] {
        let csv = format!("{HEADER}\n{}", event(day, session));
        run(dir.path(), &csv, |options| options.extend = true).unwrap();
        let rows = rows(&dir.path().join("out"));
        assert!(
            rows.iter().any(|row| row.session == session && row.day_index == i64::from(day)),
            "{session}"
        );
    }
    let sessions = workflow(dir.path());
    let sessions = sessions.vocabulary(Coded::Session);
    let ids: Vec<_> = (2..7)
        .map(|id| crate::support::decoded(&workflow(dir.path()), Coded::Session, id))
        .collect();
    assert_eq!(
        (sessions.len(), ids),
        (5, ["7", "8", "9", "x", "10"].map(|id| Some(id.to_owned())).into())
    );
}
