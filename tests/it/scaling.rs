//! `bireme bench scaling`: measured on this machine, predicted for others.

use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::mpirun::{Finished, has_mpirun, run_within};
use crate::train::{PROGRAM, Shop};

const LIMIT: Duration = Duration::from_secs(240);

fn scaling(shop: &Shop, ranks: &str, out: &str) -> Finished {
    let out = shop.dir.path().join(out);
    let mut command = Command::new(PROGRAM);
    command.args(["bench", "scaling", "--steps", "4", "--ranks", ranks]);
    command.arg("--config").arg(shop.config()).arg("--data").arg(shop.data()).arg("--out").arg(out);
    command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
    command.envs([
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
    ]);
    run_within(&mut command, LIMIT)
}

#[test]
fn scaling_is_measured_and_predicted() {
    if !has_mpirun("scaling was not measured") {
        return;
    }
    let shop = Shop::new(150);
    let finished = scaling(&shop, "2", "out").success();
    let out = shop.dir.path().join("out");
    assert_eq!(finished.stdout.trim(), out.join("scaling.md").to_str().unwrap());
    let json: Value = serde_json::from_str(&fs::read_to_string(out.join("scaling.json")).unwrap()).unwrap();
    let points = json["points"].as_array().unwrap();
    let names: Vec<_> = points
        .iter()
        .map(|point| {
            let [growth, table] = ["growth", "item_table"].map(|key| point[key].as_str().unwrap());
            (point["ranks"].as_u64().unwrap(), growth, table, point["global_batch"].as_u64().unwrap())
        })
        .collect();
    let expected = [
        (1, "strong", "replicated", 48),
        (2, "strong", "replicated", 48),
        (2, "weak", "replicated", 96),
        (2, "strong", "sharded", 48),
        (2, "weak", "sharded", 96),
    ];
    assert_eq!(names, expected);
    for point in points {
        assert!(point["phases"]["communication"].as_f64().unwrap() > 0.0, "{point}");
        assert!(
            point["predicted_seconds"].as_f64().unwrap() > 0.0
                && point["evaluated_per_s"].as_f64().unwrap() > 0.0
        );
    }
    assert_eq!(points[0]["efficiency"], 1.0);
    // Of 40 items, 16 numbers and a bias each.
    assert_eq!(json["model"]["numbers_per_item"], 17.0);
    assert!(json["model"]["events"].as_f64().unwrap() > json["model"]["targets"].as_f64().unwrap());
    assert_eq!(json["predictions"].as_array().unwrap().len(), 3 * 4 * 2);
    let table = fs::read_to_string(out.join("scaling.md")).unwrap();
    assert!(
        table.contains("| weak | sharded | 2 | 96 |") && table.contains("| 100000000 | sharded | 512 |"),
        "{table}"
    );
    assert!(fs::read_to_string(out.join("scaling.svg")).unwrap().contains("strong, sharded"));

    let again = scaling(&shop, "2", "out");
    assert_eq!(again.code, Some(2));
    assert!(again.stderr.contains("is not empty"), "{}", again.stderr);
}

#[test]
fn ranks_without_a_micro_batch_are_refused() {
    let shop = Shop::new(60);
    let refused = scaling(&shop, "2,7", "out");
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("7 ranks cannot share 6 micro-batches of a step"), "{}", refused.stderr);
    assert!(!shop.dir.path().join("out").exists());
}

#[test]
fn a_run_that_fails_is_told_with_its_last_words() {
    if !has_mpirun("no run failed") {
        return;
    }
    let shop = Shop::new(60);
    fs::write(shop.data().join("2/valid.parquet"), "no parquet").unwrap();
    let failed = scaling(&shop, "1", "out");
    assert_eq!(failed.code, Some(1));
    let stderr = failed.stderr;
    assert!(stderr.contains("bireme train --config") && stderr.contains("valid.parquet"), "{stderr}");
}
