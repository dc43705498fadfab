//! Settings: which events and which sessions are kept, and of which days.

use bireme_etl::{Keep, WORKFLOW, Workflow};

use crate::support::{HEADER, Row, rows, run, scratch};

/// Session `a` with products 1 to 30 on day 1, `b` with two products, `c` with one.
fn long_and_short() -> String {
    let mut csv = format!("{HEADER}\n");
    for i in 1..=30 {
        csv += &format!("2020-01-01 00:00:{i:02} UTC,view,{i},1,,,1,1,a\n");
    }
    csv + "2020-01-02 00:00:00 UTC,view,1,1,,,1,1,b\n2020-01-02 00:00:01 UTC,view,2,1,,,1,1,b\n\
           2020-01-02 00:00:00 UTC,view,1,1,,,1,1,c\n"
}

fn session(rows: &[Row], id: &str) -> Row {
    rows.iter().find(|row| row.session == id).unwrap_or_else(|| panic!("no session {id}")).clone()
}

#[test]
fn the_first_or_the_last_events_are_kept() {
    for (keep, max_length, first, last) in [
        (Keep::First, 20, 1, 20),
        (Keep::Last, 20, 11, 30),
        (Keep::First, 5, 1, 5),
        (Keep::Last, 50, 1, 30),
    ] {
        let dir = scratch();
        run(dir.path(), &long_and_short(), |options| {
            options.settings.keep = keep;
            options.settings.max_length = max_length;
        })
        .unwrap();
        let row = session(&rows(&dir.path().join("out")), "a");
        assert_eq!(row.products, (first..=last).collect::<Vec<_>>());
        assert_eq!(row.count, 30, "the count is taken before the cut");
    }
}

#[test]
fn sessions_that_are_too_short_are_left_out_and_still_counted() {
    for (min_length, kept) in [(1, 3), (2, 2), (3, 1)] {
        let dir = scratch();
        let report =
            run(dir.path(), &long_and_short(), |options| options.settings.min_length = min_length)
                .unwrap();
        let out = dir.path().join("out");
        assert_eq!(rows(&out).len(), kept);
        assert_eq!((report.n_sessions, report.n_short), (3, 3 - kept as u64));
        // The statistics are over all events, those of short sessions too.
        assert_eq!(Workflow::load(&out.join(WORKFLOW)).unwrap().statistics.n_events, 33);
    }
}

#[test]
fn repeats_go_whatever_their_type_and_equal_seconds_stay_in_file_order() {
    let dir = scratch();
    let csv = format!(
        "{HEADER}\n2020-01-01 00:00:09 UTC,view,3,1,,,1,1,a\n\
         2020-01-01 00:00:05 UTC,view,7,1,,,1,1,a\n\
         2020-01-01 00:00:05 UTC,cart,7,1,,,1,1,a\n2020-01-01 00:00:05 UTC,view,5,1,,,1,1,a\n\
         2020-01-01 00:00:05 UTC,purchase,7,1,,,1,1,a\n2020-01-01 00:00:09 UTC,view,2,1,,,1,1,a\n"
    );
    let report = run(dir.path(), &csv, |_| {}).unwrap();
    assert_eq!(report.n_repeats, 1);
    assert_eq!(session(&rows(&dir.path().join("out")), "a").products, [7, 5, 7, 3, 2]);
}

#[test]
fn days_choose_events_by_the_calendar_and_first_times_know_them_all() {
    let dir = scratch();
    let csv = format!(
        "{HEADER}\n2020-01-01 12:00:00 UTC,view,1,1,,,1,1,a\n\
         2020-01-01 12:00:01 UTC,view,2,1,,,1,1,a\n\
         2020-01-02 23:59:58 UTC,view,1,1,,,1,1,b\n2020-01-02 23:59:59 UTC,view,3,1,,,1,1,b\n\
         2020-01-03 00:00:00 UTC,view,4,1,,,1,1,b\n2020-01-03 13:00:00 UTC,view,4,1,,,1,1,c\n\
         2020-01-03 13:00:01 UTC,view,1,1,,,1,1,c\n"
    );
    run(dir.path(), &csv, |options| options.days = Some(2..=2)).unwrap();
    let out = dir.path().join("out");
    let rows = rows(&out);
    assert_eq!(rows.len(), 1);
    // A session over midnight is cut there. Its day index counts whole 24 hours since the very
    // first event.
    assert_eq!((rows[0].products.as_slice(), rows[0].day_index), ([1, 3].as_slice(), 2));
    let workflow = Workflow::load(&out.join(WORKFLOW)).unwrap();
    assert_eq!(workflow.statistics.n_events, 2);
    assert_eq!(workflow.statistics.days, Some((2, 2)));
    assert_eq!(workflow.first_seen(1), Some(1_577_880_000));
    assert_eq!(
        workflow.first_seen(4),
        Some(1_578_009_600),
        "a product of other days has its first time, too"
    );
    // 1.4999.. days and 0 days: (x - mean) / std of two values is plus and minus the root of a
    // half.
    let recency = &rows[0].lists["product_recency_days_log_norm-list_seq"];
    assert!(
        (recency[0] - 0.5_f64.sqrt()).abs() < 1e-6 && (recency[1] + 0.5_f64.sqrt()).abs() < 1e-6
    );
}

#[test]
fn equal_prices_are_centred_and_not_divided_by_nothing() {
    let dir = scratch();
    run(dir.path(), &long_and_short(), |_| {}).unwrap();
    for row in rows(&dir.path().join("out")) {
        assert!(row.lists["price_log_norm-list_seq"].iter().all(|x| x.abs() < 1e-6));
        assert!(row.lists["relative_price_to_avg_categ_id-list_seq"].iter().all(|x| *x == 0.0));
    }
}
