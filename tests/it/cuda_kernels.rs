//! The project's CUDA kernels compute what the CPU computes: on a GPU, or on the fake CUDA runtime,
//! which runs them on a CPU (see [`crate::fake_cuda`]).

use bireme::device::{DeviceChoice, place};
use bireme_kernels::adamw::{AdamWBuffers, AdamWStep, adamw as adamw_on_cpu};
use bireme_kernels::cuda::{
    AdagradTable, AdamWTable, RowGradients, SortedRows, StepBuffers, StepSums, adagrad_rows, adamw,
    finish_step, lazy_adamw_rows, load, sort_rows, sum_of_squares, sum_rows,
};
use bireme_kernels::dropout::dropout as masked;
use tch::{Device, Kind, Tensor};

/// The first GPU. `None` skips the test.
fn gpu() -> Option<Device> {
    let missing = match place(DeviceChoice::Cuda, 1, 0, 1) {
        Ok(place) => load(place.device).err(),
        Err(error) => Some(error.to_string()),
    };
    match missing {
        None => Some(Device::Cuda(0)),
        Some(problem) => {
            println!("skipped: no GPU: {problem}");
            None
        }
    }
}

/// Numbers in `[-1, 1]` of a shape, on the CPU.
fn wave(size: &[i64], frequency: f64) -> Tensor {
    let n: i64 = size.iter().product();
    (Tensor::arange(n, (Kind::Float, Device::Cpu)) * frequency).sin().view(size)
}

/// Asserts that two tensors are equal up to `error`.
fn assert_near(name: &str, gpu: &Tensor, cpu: &Tensor, error: f64) {
    let largest = (gpu.to_device(Device::Cpu) - cpu).abs().max().double_value(&[]);
    assert!(largest <= error, "{name}: {largest}");
}

#[test]
fn a_step_on_a_gpu_equals_the_step_on_the_cpu() {
    let Some(device) = gpu() else { return };
    let (n, n_targets, rate, max_norm, weight_decay) = (5003, 8.0, 0.0078125, 0.5, 0.25);
    // Copied, because the fake CUDA runtime does not compute what libtorch's kernels would.
    let zeros = || Tensor::zeros([n], (Kind::Float, Device::Cpu));
    let buffers = |device| AdamWBuffers {
        values: wave(&[n], 0.7).to_device(device),
        gradients: zeros().to_device(device),
        m: zeros().to_device(device),
        v: zeros().to_device(device),
    };
    let (mut on_gpu, mut on_cpu) = (buffers(device), buffers(Device::Cpu));
    let mut step = StepBuffers::new(device);
    step.set_n_steps(4);
    let to_gpu = |numbers: &[f32]| Tensor::from_slice(numbers).to_device(device);
    let rates = Tensor::from_slice(&[rate, 1.0]).to_device(device);
    for n_steps in 5..=7 {
        let gradients = wave(&[n], f64::from(n_steps));
        on_gpu.gradients.copy_(&gradients);
        on_cpu.gradients.copy_(&gradients);
        let further = Tensor::from_slice(&[2f32, 1.0]);
        let scalars = to_gpu(&[12.0, n_targets as f32, 0.0, 1.0]);
        let parts = [&on_gpu.gradients, &further.to_device(device)];
        sum_of_squares(&parts, &mut step).unwrap();
        let (own_loss, extra_squares) = (to_gpu(&[3.0]), to_gpu(&[4.0]));
        let sums = StepSums {
            scalars: &scalars,
            own_loss: &own_loss,
            extra_squares: Some(&extra_squares),
            rates: &rates,
            max_norm,
            weight_decay,
        };
        finish_step(sums, &mut step).unwrap();
        adamw(&mut on_gpu, &step).unwrap();
        let squares = gradients.to_kind(Kind::Double).square().sum(Kind::Double);
        let norm = (squares.double_value(&[]) + 5.0 + 4.0).sqrt() / n_targets;
        let outcome = Vec::<f64>::try_from(step.outcome.to_device(Device::Cpu)).unwrap();
        assert_eq!([&outcome[..4], &outcome[5..]].concat(), [12.0, n_targets, 0.0, 1.0, 3.0]);
        assert!((outcome[4] / norm - 1.0).abs() < 1e-12, "{outcome:?}");
        assert_near("scalars", &scalars, &Tensor::from_slice(&[0f32; 4]), 0.0);
        assert_near("own loss", &own_loss, &Tensor::from_slice(&[0f32]), 0.0);
        let scale = ((max_norm / (outcome[4] + 1e-6)).min(1.0) / n_targets) as f32;
        let on_this_step =
            AdamWStep { learning_rate: rate, n_steps, decay_factor: 1.0 - rate * weight_decay };
        adamw_on_cpu(&mut on_cpu, &Tensor::from(scale), on_this_step);
        for (name, gpu, cpu) in [
            ("values", &on_gpu.values, &on_cpu.values),
            ("gradients", &on_gpu.gradients, &on_cpu.gradients),
            ("m", &on_gpu.m, &on_cpu.m),
            ("v", &on_gpu.v, &on_cpu.v),
        ] {
            assert_near(name, gpu, cpu, 0.0);
        }
    }
}

#[test]
fn a_gpu_and_the_cpu_drop_the_same_values() {
    let Some(device) = gpu() else { return };
    for (size, drawn) in [
        (&[500, 64][..], &[64][..]),
        (&[7, 101], &[101]),
        (&[3, 2, 4, 4], &[2, 9, 9]),
        (&[3, 2, 5], &[2, 9]),
        (&[6], &[]),
        (&[0, 4], &[4]),
    ] {
        let x = wave(size, 0.3);
        let keys: Vec<i32> = (0..size[0] as i32).map(|row| row * 77 - 50).collect();
        let keys = Tensor::from_slice(&keys);
        let on_cpu = masked(&x, &keys, 3, drawn, 0.3);
        let (x, keys) = (x.to_device(device), keys.to_device(device));
        let on_gpu = masked(&x, &keys, 3, drawn, 0.3).to_device(Device::Cpu);
        assert!(on_gpu.equal(&on_cpu), "{size:?}");
    }
}

#[test]
fn optimizers_of_rows_equal_the_dense_formulas() {
    let Some(device) = gpu() else { return };
    let (n_rows, n_columns, rate, momentum) = (40, 6, 0.05, 0.25);
    let listed: Vec<i64> = (0..300).map(|i: i64| i * 37 % 29 - 2).collect();
    let n = listed.len() as i64;
    let gradients = wave(&[n, n_columns], 1.3);
    // Rows −2 and −1 are unused.
    let ids = Tensor::from_slice(&listed);
    let dense = Tensor::zeros([n_rows + 2, n_columns], (Kind::Float, Device::Cpu));
    let dense = dense.index_add(0, &(&ids + 2), &gradients).narrow(0, 2, n_rows);
    let is_listed = dense.abs().sum_dim_intlist([1i64].as_slice(), true, Kind::Float).gt(0.0);

    let mut sorted = SortedRows::new(n, device);
    let mut rows = RowGradients::new(n, n_columns, device);
    sort_rows(&ids.to_device(device), &mut sorted).unwrap();
    sum_rows(&sorted, &gradients.to_device(device), &mut rows).unwrap();
    let mut step = StepBuffers::new(device);
    let to_gpu = |numbers: &[f32]| Tensor::from_slice(numbers).to_device(device);
    let rates = Tensor::from_slice(&[0.5, rate]).to_device(device);
    step.scale = to_gpu(&[0.5]);
    step.adamw_rates = to_gpu(&[0.125, 0.75]);

    let g = dense * 0.5;
    let values = || wave(&[n_rows, n_columns], 0.7);
    let (squares, last_step) = (values().square(), values() * 0.125);
    let on_gpu = [values(), squares.copy(), last_step.copy()].map(|x| x.to_device(device));
    let table =
        AdagradTable { values: &on_gpu[0], squares: &on_gpu[1], last_step: Some(&on_gpu[2]) };
    adagrad_rows(table, &rows, &step, &rates, momentum).unwrap();
    let new_squares = &squares + g.square();
    let change = -rate * &g / (new_squares.sqrt() + 1e-10) + &last_step * momentum;
    let new_values = (values() + &change).where_self(&is_listed, &values());
    assert_near("values of Adagrad", &on_gpu[0], &new_values, 1e-6);
    assert_near("squares", &on_gpu[1], &new_squares, 1e-5);
    let new_last = change.where_self(&is_listed, &last_step);
    assert_near("last step", &on_gpu[2], &new_last, 1e-6);

    let on_gpu = [values(), last_step.copy(), squares.copy()].map(|x| x.to_device(device));
    let table = AdamWTable { values: &on_gpu[0], m: &on_gpu[1], v: &on_gpu[2] };
    lazy_adamw_rows(table, &rows, &step).unwrap();
    let (m, v) = (&last_step * 0.9 + &g * 0.1, &squares * 0.999 + g.square() * 0.001);
    let new_values = (values() - &m / (v.sqrt() + 1e-8) * 0.125) * 0.75;
    let new_values = new_values.where_self(&is_listed, &values());
    assert_near("values of AdamW", &on_gpu[0], &new_values, 2e-6);
    assert_near("m", &on_gpu[1], &m.where_self(&is_listed, &last_step), 1e-6);
    assert_near("v", &on_gpu[2], &v.where_self(&is_listed, &squares), 1e-6);
}
