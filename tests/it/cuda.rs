//! A GPU comes to what a CPU comes to, and ranks that NCCL ties together to what one comes to.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::export;
use crate::mpirun::{Finished, has_gpu, mpirun_on_one_gpu};
use crate::resume::{EXACT, assert_came_to_the_same};
use crate::sharded::{SHARDED, assert_close, ways_to_learn};
use crate::train::{ALL_FEATURES, CONFIG, PROGRAM, Shop, XLNET, config_with};

const ON_GPU: [&str; 2] = ["--set", "run.device=cuda"];

/// `bireme train` on ranks that share a GPU.
fn train_on_gpu(shop: &Shop, n_ranks: usize, run: &str, more: &[&str]) -> Option<Finished> {
    let arguments = shop.arguments(run, &[more, &ON_GPU].concat());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    mpirun_on_one_gpu(n_ranks, Path::new(PROGRAM), &arguments, &[], Duration::from_secs(240))
}

#[test]
fn a_gpu_learns_what_a_cpu_learns_and_ranks_on_it_what_one_does() {
    if !has_gpu() {
        return;
    }
    let shop = Shop::new(150);
    for (name, config, set) in ways_to_learn() {
        fs::write(shop.config(), config).unwrap();
        let [cpu, gpu] = ["on a CPU", "on a GPU"].map(|how| format!("{name} {how}"));
        shop.train(&cpu, &set).success();
        shop.train(&gpu, &[&set[..], &ON_GPU].concat()).success();
        // A GPU draws other negatives.
        let is_drawn = ["sampled", "gbce"].contains(&name);
        assert_close(&shop, &gpu, &cpu, if is_drawn { 0.05 } else { 1e-3 });
        for (n_ranks, parallel) in [(2, &[][..]), (3, &SHARDED)] {
            let run = format!("{name} on {n_ranks}");
            let Some(finished) = train_on_gpu(&shop, n_ranks, &run, &[&set[..], parallel].concat()) else {
                return;
            };
            let told = finished.success().stderr;
            assert!(told.contains(&format!("ranks {n_ranks} (nccl), device cuda:0")), "{told}");
            assert_close(&shop, &run, &gpu, 1e-3);
        }
    }
}

#[test]
fn reproducible_weights_on_gpus_are_the_same_to_the_last_bit_on_any_number_of_ranks() {
    if !has_gpu() {
        return;
    }
    let shop = Shop::new(150);
    let with_features = [&EXACT[..], &ALL_FEATURES].concat();
    for (model, config, set) in
        [("gru", CONFIG.to_owned(), &EXACT[..]), ("xlnet", config_with(XLNET), &with_features)]
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
                assert_came_to_the_same(&shop, &run, &one);
            }
        }
    }
}

#[test]
fn a_run_that_a_gpu_began_goes_on_without_one() {
    if !has_gpu() {
        return;
    }
    let shop = Shop::new(150);
    shop.train("unbroken", &[]).success();
    let every = ["--set", "checkpoint.every_steps=2"];
    let killed = shop.train_with(1, "run", &[&every[..], &ON_GPU].concat(), &[("BIREME_FAULT", "kill@0:7")]);
    let Some(killed) = killed else { return };
    assert_eq!(killed.code, Some(137), "{killed:#?}");
    shop.train("run", &every).success();
    assert_close(&shop, "run", "unbroken", 1e-3);
}

#[test]
fn an_exported_model_runs_on_a_gpu() {
    if !has_gpu() {
        return;
    }
    let shop = export::Shop::small();
    let repository = shop.path("repository");
    for (name, config) in export::MODELS {
        shop.train(name, config);
        shop.export(name, &[]).success();
        let exported = ["--exported", &repository, "--name", name];
        let on_cpu = shop.evaluate(name, &["--set", "run.device=cpu"]);
        let on_gpu = shop.evaluate(name, &ON_GPU);
        let exported = shop.evaluate(name, &[&exported[..], &ON_GPU].concat());
        for metric in ["loss", "ndcg_at_20", "recall_at_20", "coverage_at_20"] {
            let [a, b, c] = [&on_cpu, &on_gpu, &exported].map(|record| record[metric].as_f64().unwrap());
            assert!((a - b).abs() < 1e-4 && (a - c).abs() < 1e-4, "{name}: {metric} {a}, {b} and {c}");
        }
    }
}
