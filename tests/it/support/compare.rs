//! Compares two runs of a [`SessionShop`]: to the last bit, but for rounding, or roughly.

use std::fs;

use serde_json::Value;
use tch::Tensor;

use super::session_shop::SessionShop;
use super::tensors::distance;

/// Records without times, and the bytes of the newest checkpoint, of the outcomes and of the
/// results.
fn results(shop: &SessionShop, run: &str) -> (Vec<Value>, Vec<Vec<u8>>) {
    let records = ["step", "eval"].iter().flat_map(|kind| shop.records(run, kind));
    let without_times = records.map(|mut record| {
        for key in ["seconds", "sessions_per_s"] {
            record.as_object_mut().unwrap().remove(key);
        }
        record
    });
    let newest = shop.newest_checkpoint(run);
    let tensors = ["weights", "optimizer", "occurrences"];
    let tensors = tensors.map(|file| newest.join(format!("{file}.safetensors")));
    let run_dir = shop.run_dir(run);
    let outcomes = [2, 3].map(|day| run_dir.join(format!("evaluations/day-{day}-valid.parquet")));
    let files = tensors.into_iter().chain(outcomes).chain([run_dir.join("results.txt")]);
    (without_times.collect(), files.map(|file| fs::read(file).unwrap()).collect())
}

/// Asserts the same records, checkpoint, outcomes and results, to the last bit.
#[track_caller]
pub fn assert_identical(shop: &SessionShop, run: &str, expected: &str) {
    let ((records, files), (expected_records, expected_files)) =
        (results(shop, run), results(shop, expected));
    assert_eq!(records.len(), expected_records.len());
    let differing = records.iter().zip(&expected_records).find(|(ours, theirs)| ours != theirs);
    assert!(differing.is_none(), "{run}, {expected}: {differing:?}");
    assert!(
        files == expected_files,
        "{run}: weights, optimizer, occurrences, outcomes or results differ"
    );
}

/// Asserts the same steps and evaluations, with losses that differ by rounding only.
#[track_caller]
pub fn assert_same_steps(shop: &SessionShop, run: &str, other: &str) {
    let (steps, others) = (shop.records(run, "step"), shop.records(other, "step"));
    assert_eq!(steps.len(), others.len());
    for (a, b) in steps.iter().zip(&others) {
        for key in ["day", "epoch", "step", "lr"] {
            assert_eq!(a[key], b[key], "{run}, {other}: {key}");
        }
        let [a, b] = [a, b].map(|record| record["loss"].as_f64().unwrap());
        assert!((a - b).abs() <= 1e-6 * a, "{run} {a}, {other} {b}");
    }
    let (evals, others) = (shop.evaluations(run), shop.evaluations(other));
    assert_eq!(evals.len(), 2);
    for (mut a, mut b) in evals.into_iter().zip(others) {
        let [loss_a, loss_b] = [&mut a, &mut b].map(|record| record["loss"].take().as_f64());
        assert_eq!(a, b);
        let [a, b] = [loss_a, loss_b].map(|loss| loss.unwrap_or(0.0));
        assert!((a - b).abs() <= 1e-6 * a, "{run} {a}, {other} {b}");
    }
}

/// Asserts losses of steps and evaluations whose relative difference is below `bound`.
#[track_caller]
pub fn assert_close_losses(shop: &SessionShop, run: &str, other: &str, bound: f64) {
    let losses = |run: &str| -> Vec<f64> {
        let records = ["step", "eval"].iter().flat_map(|kind| shop.records(run, kind));
        records.map(|record| record["loss"].as_f64().unwrap()).collect()
    };
    let (ours, theirs) = (losses(run), losses(other));
    assert_eq!(ours.len(), theirs.len());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert!((ours / theirs - 1.0).abs() < bound, "{run}: {ours}, {other}: {theirs}");
    }
    let sessions = |run: &str| -> Vec<Value> {
        shop.records(run, "eval").iter().map(|record| record["n_sessions"].clone()).collect()
    };
    assert_eq!(sessions(run), sessions(other));
}

/// Asserts weights and optimizer states that differ by a thousandth of the largest number of a
/// tensor.
#[track_caller]
pub fn assert_close_tensors(shop: &SessionShop, run: &str, other: &str) {
    let tensors = |run: &str| -> Vec<(String, Tensor)> {
        let newest = shop.newest_checkpoint(run);
        let mut tensors = Tensor::read_safetensors(newest.join("weights.safetensors")).unwrap();
        tensors.extend(Tensor::read_safetensors(newest.join("optimizer.safetensors")).unwrap());
        tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
        tensors
    };
    let (ours, theirs) = (tensors(run), tensors(other));
    assert_eq!(ours.len(), theirs.len());
    for ((name, ours), (other, theirs)) in ours.iter().zip(&theirs) {
        assert_eq!(name, other);
        let largest = theirs.abs().max().double_value(&[]).max(1e-3);
        let difference = distance(ours, theirs);
        assert!(difference < 1e-3 * largest, "{run}: {name} differs by {difference}");
    }
}

/// Asserts two runs that differ, but little, as with numbers rounded to bf16.
#[track_caller]
pub fn assert_similar(shop: &SessionShop, run: &str, other: &str) {
    let [whole, rounded] = [run, other].map(|run| shop.records(run, "step"));
    for (a, b) in whole.iter().zip(&rounded) {
        assert_eq!(a["n_targets"], b["n_targets"]);
        let [a, b] = [a, b].map(|record| record["loss"].as_f64().unwrap());
        assert!((a - b).abs() < 0.01 * a, "{a} {b}");
    }
    assert_ne!(whole[1]["loss"], rounded[1]["loss"]);
    let [a, b] = [run, other].map(|run| shop.evaluations(run)[1]["ndcg_at_20"].as_f64().unwrap());
    assert!((a - b).abs() < 0.03, "{a} {b}");
}
