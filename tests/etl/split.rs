//! Sessions are assigned to train, valid and test by their ids and the seed alone.

use std::collections::BTreeMap;

use bireme_etl::Split;

use crate::support::{HEADER, Random, rows, run, scratch, shop};

#[test]
fn the_fractions_are_80_10_10() {
    let mut counts = [0; 3];
    for i in 0..100_000 {
        counts[Split::of(&format!("session-{i}"), 42) as usize] += 1;
    }
    // Five standard deviations of 100,000 draws.
    assert!((79_368..=80_632).contains(&counts[0]), "{counts:?}");
    assert!((9_526..=10_474).contains(&counts[1]), "{counts:?}");
    assert!((9_526..=10_474).contains(&counts[2]), "{counts:?}");
}

#[test]
fn the_split_of_known_ids_never_changes() {
    // A change here would move sessions from train to test between two runs on one data set. The
    // figures come from another implementation of the hash, python-xxhash: xxh3_64_intdigest(id,
    // seed=42) * 10 >> 64.
    let split: Vec<_> = (0..20).map(|i| Split::of(&format!("session-{i}"), 42) as u8).collect();
    assert_eq!(split, [0, 0, 0, 0, 1, 0, 1, 0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0]);
}

#[test]
fn the_split_does_not_depend_on_the_order_of_the_rows() {
    let (a, b) = (scratch(), scratch());
    let csv = shop(400);
    let mut lines: Vec<_> = csv.lines().skip(1).collect();
    // Another order; within a second, rows of a session may change places, so products are not
    // compared.
    let mut random = Random(3);
    for i in (1..lines.len()).rev() {
        lines.swap(i, random.below(i as u64 + 1) as usize);
    }
    let shuffled = format!("{HEADER}\n{}\n", lines.join("\n"));
    run(a.path(), &csv, |_| {}).unwrap();
    run(b.path(), &shuffled, |_| {}).unwrap();
    let splits = |dir: &std::path::Path| -> BTreeMap<String, (i64, Split)> {
        rows(&dir.join("out"))
            .into_iter()
            .map(|row| (row.session, (row.day_index, row.split)))
            .collect()
    };
    let (a, b) = (splits(a.path()), splits(b.path()));
    let common: Vec<_> = a.keys().filter(|id| b.contains_key(*id)).collect();
    assert!(common.len() > 250);
    for id in common {
        assert_eq!(a[id], b[id], "{id}");
    }
}

#[test]
fn another_seed_deals_otherwise_and_the_same_seed_the_same() {
    let csv = shop(300);
    let splits = |seed: u64| -> BTreeMap<String, Split> {
        let dir = scratch();
        run(dir.path(), &csv, |options| options.settings.seed = seed).unwrap();
        rows(&dir.path().join("out")).into_iter().map(|row| (row.session, row.split)).collect()
    };
    let first = splits(1);
    assert_eq!(splits(1), first);
    assert_ne!(splits(2), first);
    for (id, split) in first {
        assert_eq!(split, Split::of(&id, 1));
    }
}
