//! A GPU computes what a CPU computes, and ranks over NCCL compute what one rank computes.

use std::fs;

use crate::support::compare::{assert_close_losses, assert_identical};
use crate::support::configs::{
    ALL_FEATURES, CONFIG, MODELS, RESUMABLE, SHARDED, Variant, XLNET, config_with, variants,
};
use crate::support::event_shop::EventShop;
use crate::support::mpirun::mpirun_on_one_gpu;
use crate::support::process::{Finished, LIMIT};
use crate::support::requirements::has_gpu;
use crate::support::session_shop::SessionShop;

const ON_GPU: [&str; 2] = ["--set", "run.device=cuda"];

/// `bireme train` on ranks that share a GPU.
fn train_on_gpu(shop: &SessionShop, n_ranks: usize, run: &str, more: &[&str]) -> Option<Finished> {
    mpirun_on_one_gpu(n_ranks, &shop.train_command(run, &[more, &ON_GPU].concat()), LIMIT)
}

#[test]
fn losses_on_a_gpu_are_those_on_a_cpu_for_any_number_of_ranks() {
    if !has_gpu() {
        return;
    }
    let shop = SessionShop::new(150);
    for Variant { name, config, set } in variants() {
        fs::write(shop.config(), config).unwrap();
        let [cpu, gpu] = ["on a CPU", "on a GPU"].map(|how| format!("{name} {how}"));
        shop.train(&cpu, &set).success();
        shop.train(&gpu, &[&set[..], &ON_GPU].concat()).success();
        // A GPU draws other negatives.
        let is_drawn = ["sampled", "gbce"].contains(&name);
        assert_close_losses(&shop, &gpu, &cpu, if is_drawn { 0.05 } else { 1e-3 });
        for (n_ranks, parallel) in [(2, &[][..]), (3, &SHARDED)] {
            let run = format!("{name} on {n_ranks}");
            let Some(finished) = train_on_gpu(&shop, n_ranks, &run, &[&set[..], parallel].concat())
            else {
                return;
            };
            let message = finished.success().stderr;
            assert!(
                message.contains(&format!("ranks {n_ranks} (nccl), device cuda:0")),
                "{message}"
            );
            assert_close_losses(&shop, &run, &gpu, 1e-3);
        }
    }
}

#[test]
fn reproducible_weights_on_gpus_are_the_same_to_the_last_bit_on_any_number_of_ranks() {
    if !has_gpu() {
        return;
    }
    let shop = SessionShop::new(150);
    let with_features = [&RESUMABLE[..], &ALL_FEATURES].concat();
    for (model, config, set) in
        [("gru", CONFIG.to_owned(), &RESUMABLE[..]), ("xlnet", config_with(XLNET), &with_features)]
    {
        fs::write(shop.config(), config).unwrap();
        for (parallel, more) in [("whole", &[][..]), ("shared out", &SHARDED)] {
            let set = [set, more].concat();
            let one = format!("{model} {parallel} on 1");
            shop.train(&one, &[&set[..], &ON_GPU].concat()).success();
            for n_ranks in [2, 3] {
                let run = format!("{model} {parallel} on {n_ranks}");
                let Some(finished) = train_on_gpu(&shop, n_ranks, &run, &set) else { return };
                finished.success();
                assert_identical(&shop, &run, &one);
            }
        }
    }
}

#[test]
fn a_run_started_on_a_gpu_resumes_on_a_cpu() {
    if !has_gpu() {
        return;
    }
    let shop = SessionShop::new(150);
    shop.train("unbroken", &[]).success();
    let every = ["--set", "checkpoint.every_steps=2"];
    let killed = shop.train_with_fault(1, "run", &[&every[..], &ON_GPU].concat(), "kill@0:7");
    let Some(killed) = killed else { return };
    assert_eq!(killed.code, Some(137), "{killed:#?}");
    shop.train("run", &every).success();
    assert_close_losses(&shop, "run", "unbroken", 1e-3);
}

#[test]
fn an_exported_model_runs_on_a_gpu() {
    if !has_gpu() {
        return;
    }
    let shop = EventShop::small();
    let repository = shop.path("repository");
    for (name, config) in MODELS {
        shop.train(name, config);
        shop.export(name, &[]).success();
        let exported = ["--exported", &repository, "--name", name];
        let on_cpu = shop.evaluate(name, &["--set", "run.device=cpu"]);
        let on_gpu = shop.evaluate(name, &ON_GPU);
        let exported = shop.evaluate(name, &[&exported[..], &ON_GPU].concat());
        for metric in ["loss", "ndcg_at_20", "recall_at_20", "coverage_at_20"] {
            let [a, b, c] =
                [&on_cpu, &on_gpu, &exported].map(|record| record[metric].as_f64().unwrap());
            assert!(
                (a - b).abs() < 1e-4 && (a - c).abs() < 1e-4,
                "{name}: {metric} {a}, {b} and {c}"
            );
        }
    }
}
