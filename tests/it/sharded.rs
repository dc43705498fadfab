//! Sharded item tables give the model that replicated ones give.

use std::fs;

use crate::support::compare::{assert_close_losses, assert_close_tensors, assert_identical};
use crate::support::configs::{
    ALL_FEATURES, CONFIG, REPRODUCIBLE, SHARDED, Variant, XLNET, config_with, variants,
};
use crate::support::mpirun::mpirun;
use crate::support::process::LIMIT;
use crate::support::session_shop::SessionShop;

#[test]
fn sharded_tables_give_the_same_losses_figures_and_checkpoints() {
    let shop = SessionShop::new(150);
    for Variant { name, config, set } in variants() {
        fs::write(shop.config(), config).unwrap();
        let whole = format!("{name} whole");
        shop.train(&whole, &set).success();
        for n_ranks in [2, 3] {
            let run = format!("{name} on {n_ranks}");
            let Some(finished) = shop.train_on(n_ranks, &run, &[&set[..], &SHARDED].concat())
            else {
                return;
            };
            finished.success();
            assert_close_losses(&shop, &run, &whole, 1e-5);
            assert_close_tensors(&shop, &run, &whole);
        }
    }
}

#[test]
fn a_run_resumes_with_sharded_or_replicated_tables() {
    let shop = SessionShop::new(150);
    shop.train("unbroken", &[]).success();
    // Killed where every other step was saved, and each time gone on with in another way.
    let every = ["--set", "checkpoint.every_steps=2"];
    let kills: [(usize, &str, &[&str]); 4] =
        [(3, "kill@1:3", &SHARDED), (2, "kill@0:7", &[]), (2, "kill@1:11", &SHARDED), (1, "", &[])];
    for (n_ranks, fault, parallel) in kills {
        let set = [&every[..], parallel].concat();
        let finished = if fault.is_empty() {
            shop.train_on(n_ranks, "run", &set)
        } else {
            shop.train_with_fault(n_ranks, "run", &set, fault)
        };
        let Some(finished) = finished else { return };
        assert_eq!(finished.code, Some(if fault.is_empty() { 0 } else { 137 }), "{finished:#?}");
    }
    assert_close_losses(&shop, "run", "unbroken", 1e-5);
    assert_close_tensors(&shop, "run", "unbroken");
}

#[test]
fn more_ranks_than_shards_are_refused() {
    let shop = SessionShop::new(100);
    let Some(refused) = shop.train_on(4, "run", &SHARDED) else { return };
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    let expected = "the largest number of shards, 3, of an item table of 40 rows";
    assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    // So is the evaluation of a run that fewer made.
    shop.train("run", &SHARDED).success();
    let evaluate = shop.evaluate_command("run", &[]);
    let refused = mpirun(4, &evaluate, LIMIT).unwrap();
    assert_eq!(refused.code, Some(2), "{refused:#?}");
    assert!(refused.stderr.contains(expected), "{}", refused.stderr);
    mpirun(3, &evaluate, LIMIT).unwrap().success();
}

#[test]
fn reproducible_weights_are_the_same_to_the_last_bit_on_any_number_of_ranks() {
    let shop = SessionShop::new(150);
    // Four micro-batches, which three ranks cannot share evenly.
    let reproducible = [&SHARDED[..], &REPRODUCIBLE, &["--set", "train.micro_batch=12"]].concat();
    let with_features = [&reproducible[..], &ALL_FEATURES].concat();
    let smoothed = ["--set", "train.loss={ kind = \"softmax\", label_smoothing = 0.1 }"];
    let sampled = ["--set", "train.loss={ kind = \"sampled\", n_negatives = 12, in_batch = true }"];
    let evidence = ["--set", "model.head.evidence={ hidden_width = 8 }"];
    let content = ["--set", "model.input.content={ id_dropout = 0.3 }"];
    let cosine = ["--set", "model.head.cosine=true", "--set", "model.head.temperature=0.1"];
    let replaced = CONFIG.replace(
        "[train]",
        "[model.objective]\nkind = \"replaced\"\nprobability = 0.3\nweight = 1.0\n[train]",
    );
    let cases = [
        ("gru", CONFIG.to_owned(), [&reproducible[..], &smoothed].concat()),
        ("sampled", CONFIG.to_owned(), [&reproducible[..], &sampled].concat()),
        ("replaced", replaced, reproducible.clone()),
        ("evidence", CONFIG.to_owned(), [&reproducible[..], &evidence].concat()),
        (
            "sampled evidence",
            CONFIG.to_owned(),
            [&reproducible[..], &evidence, &sampled, &["--set", "model.input.dropout=0.3"]]
                .concat(),
        ),
        ("content", CONFIG.to_owned(), [&with_features[..], &content, &evidence].concat()),
        (
            "sampled content and cosine",
            CONFIG.to_owned(),
            [&with_features[..], &content, &cosine, &sampled].concat(),
        ),
        ("xlnet", config_with(XLNET), with_features),
    ];
    for (name, config, set) in cases {
        fs::write(shop.config(), config).unwrap();
        let alone = format!("{name} alone");
        shop.train(&alone, &set).success();
        for n_ranks in [1, 2, 3] {
            let run = format!("{name} on {n_ranks}");
            let Some(finished) = shop.train_on(n_ranks, &run, &set) else { return };
            finished.success();
            assert_identical(&shop, &run, &alone);
        }
        // They are also those of tables that are not shared out, but for rounding.
        let whole = format!("{name} whole");
        shop.train(&whole, &[&set[..], &["--set", "parallel.item_table=replicated"]].concat())
            .success();
        assert_close_losses(&shop, &alone, &whole, 1e-5);
    }
}
