; Generated from thread_pool.c by `make thread-pool-ir` with clang 16: do not edit.

%struct.thread_pool = type { i32, [60 x i8], i32, [60 x i8], ptr, i64, i64, [40 x i8], i64, [56 x i8], i64, [56 x i8], i64, i64, [48 x i8], [16 x i64], [16 x i64], [0 x i64] }
%struct.step = type { ptr, ptr, ptr, ptr, ptr, i64, i64, i64, i64, [56 x i8], i64, i64, i64, i64, [32 x i8] }

define void @pool_worker(ptr %pool) nounwind {
entry:
  %workers_started = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 13
  %0 = atomicrmw add ptr %workers_started, i64 1 seq_cst, align 8
  %arrayidx = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 17, i64 %0
  %call = tail call i64 (i64, ...) @syscall(i64 178)
  store atomic i64 %call, ptr %arrayidx seq_cst, align 8
  %stop = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 8
  %active_workers = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 10
  %rem = and i64 %0, 1
  %cmp9 = icmp eq i64 %rem, 0
  %sleepers = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 2
  br label %for.cond

for.cond:
  %spins.0 = phi i64 [ 0, %entry ], [ %spins.2, %cleanup ]
  %served.0 = phi i32 [ 0, %entry ], [ %served.2, %cleanup ]
  %1 = load atomic i32, ptr %pool seq_cst, align 64
  %cmp.not = icmp eq i32 %1, %served.0
  br i1 %cmp.not, label %if.else, label %if.then

if.then:
  %2 = load atomic i64, ptr %stop seq_cst, align 64
  %tobool.not = icmp eq i64 %2, 0
  br i1 %tobool.not, label %if.end, label %cleanup

if.end:
  %3 = atomicrmw add ptr %active_workers, i64 1 seq_cst, align 8
  tail call fastcc void @work(ptr %pool, i32 %1, i1 %cmp9)
  %4 = atomicrmw sub ptr %active_workers, i64 1 seq_cst, align 8
  br label %cleanup

if.else:
  %inc = add i64 %spins.0, 1
  %cmp13 = icmp ugt i64 %inc, 2500
  br i1 %cmp13, label %if.then14, label %if.else22

if.then14:
  %5 = atomicrmw add ptr %sleepers, i32 1 seq_cst, align 4
  %call18 = tail call i64 (i64, ...) @syscall(i64 98, ptr %pool, i32 128, i32 %served.0, ptr null)
  %6 = atomicrmw sub ptr %sleepers, i32 1 seq_cst, align 4
  br label %cleanup

if.else22:
  tail call void @llvm.aarch64.hint(i32 1)
  br label %cleanup

cleanup:
  %cond = phi i1 [ false, %if.then ], [ true, %if.then14 ], [ true, %if.else22 ], [ true, %if.end ]
  %spins.2 = phi i64 [ %spins.0, %if.then ], [ 0, %if.then14 ], [ %inc, %if.else22 ], [ 0, %if.end ]
  %served.2 = phi i32 [ %served.0, %if.then ], [ %served.0, %if.then14 ], [ %served.0, %if.else22 ], [ %1, %if.end ]
  br i1 %cond, label %for.cond, label %cleanup25

cleanup25:
  ret void
}

declare i64 @syscall(i64 noundef, ...)

define internal fastcc void @work(ptr %pool, i32 %call, i1 %from_back) nounwind {
entry:
  %steps1 = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 4
  %0 = load atomic i64, ptr %steps1 seq_cst, align 64
  %1 = inttoptr i64 %0 to ptr
  %num_steps2 = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 5
  %2 = load atomic i64, ptr %num_steps2 monotonic, align 8
  %num_threads = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 6
  %3 = load i64, ptr %num_threads, align 16
  %mul = shl i64 %3, 4
  %cond.i = tail call i64 @llvm.umin.i64(i64 %mul, i64 16384)
  %cmp50.not = icmp eq i64 %2, 0
  br i1 %cmp50.not, label %cleanup16, label %for.body.lr.ph

for.body.lr.ph:
  %cond13.i = select i1 %from_back, i64 1, i64 65536
  br label %for.body

for.body:
  %index.051 = phi i64 [ 0, %for.body.lr.ph ], [ %inc, %wait_for_step.exit ]
  %arrayidx = getelementptr inbounds %struct.step, ptr %1, i64 %index.051
  %num_items5 = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 7
  %4 = load atomic i64, ptr %num_items5 acquire, align 8
  %items_per_block = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 6
  %5 = load i64, ptr %items_per_block, align 16
  %add.i = add i64 %4, -1
  %sub.i = add i64 %add.i, %5
  %div.i = udiv i64 %sub.i, %5
  %units_per_block = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 5
  %6 = load i64, ptr %units_per_block, align 8
  %mul8 = mul i64 %6, %div.i
  %div = udiv i64 %mul8, %cond.i
  %cond.i37 = tail call i64 @llvm.umax.i64(i64 %div, i64 1)
  %add.i.i = add i64 %mul8, -1
  %sub.i.i = add i64 %add.i.i, %cond.i37
  %div.i.i = udiv i64 %sub.i.i, %cond.i37
  %claims2.i = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 8
  %source.i = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 1
  %target.i = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 2
  %weights.i = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 3
  %bias.i = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 4
  %units_done.i = getelementptr inbounds %struct.step, ptr %1, i64 %index.051, i32 10
  br label %for.cond.i

for.cond.i:
  %retval.0.i = phi i1 [ undef, %for.body ], [ %retval.2.i, %for.cond.i.backedge ]
  %7 = load atomic i64, ptr %claims2.i acquire, align 64
  %shr.i.i = lshr i64 %7, 32
  %conv.i.i = trunc i64 %shr.i.i to i32
  %cmp.not.i = icmp eq i32 %conv.i.i, %call
  br i1 %cmp.not.i, label %if.end.i, label %cleanup26.i

if.end.i:
  %shr.i = lshr i64 %7, 16
  %and.i = and i64 %shr.i, 65535
  %and4.i = and i64 %7, 65535
  %add.i38 = add nuw nsw i64 %and.i, %and4.i
  %cmp5.not.i = icmp ult i64 %add.i38, %div.i.i
  br i1 %cmp5.not.i, label %if.end7.i, label %cleanup26.i

if.end7.i:
  %add14.i = add i64 %7, %cond13.i
  %8 = cmpxchg ptr %claims2.i, i64 %7, i64 %add14.i acq_rel acquire, align 8
  %9 = extractvalue { i64, i1 } %8, 1
  br i1 %9, label %if.end18.i, label %cleanup26.i

if.end18.i:
  %10 = xor i64 %and4.i, -1
  %sub8.i = add i64 %div.i.i, %10
  %cond.i39 = select i1 %from_back, i64 %sub8.i, i64 %and.i
  %mul.i = mul i64 %cond.i39, %cond.i37
  %add9.i = add i64 %mul.i, %cond.i37
  %cond.i.i = tail call i64 @llvm.umin.i64(i64 %add9.i, i64 %mul8)
  %11 = load ptr, ptr %arrayidx, align 64
  %12 = load ptr, ptr %source.i, align 8
  %13 = load ptr, ptr %target.i, align 16
  %14 = load ptr, ptr %weights.i, align 8
  %15 = load ptr, ptr %bias.i, align 32
  tail call void %11(ptr %12, ptr %13, ptr %14, ptr %15, i64 %div.i, i64 %mul.i, i64 %cond.i.i)
  %sub20.i = sub i64 %cond.i.i, %mul.i
  %16 = atomicrmw add ptr %units_done.i, i64 %sub20.i release, align 8
  br label %cleanup26.i

cleanup26.i:
  %cleanup.dest.slot.2.i = phi i32 [ 1, %for.cond.i ], [ 1, %if.end.i ], [ 0, %if.end18.i ], [ 3, %if.end7.i ]
  %retval.2.i = phi i1 [ false, %for.cond.i ], [ true, %if.end.i ], [ %retval.0.i, %if.end18.i ], [ %retval.0.i, %if.end7.i ]
  switch i32 %cleanup.dest.slot.2.i, label %compute_chunks.exit [
    i32 0, label %for.cond.i.backedge
    i32 3, label %for.cond.i.backedge
  ]

for.cond.i.backedge:
  br label %for.cond.i

compute_chunks.exit:
  br i1 %retval.2.i, label %lor.lhs.false, label %cleanup16

lor.lhs.false:
  %17 = load atomic i64, ptr %units_done.i acquire, align 64
  %cmp.not10.i = icmp eq i64 %17, %mul8
  br i1 %cmp.not10.i, label %wait_for_step.exit, label %for.body.i.preheader

for.body.i.preheader:
  %18 = load atomic i64, ptr %claims2.i acquire, align 64
  %shr.i.i4145 = lshr i64 %18, 32
  %conv.i.i4246 = trunc i64 %shr.i.i4145 to i32
  %cmp3.not.i47 = icmp eq i32 %conv.i.i4246, %call
  br i1 %cmp3.not.i47, label %if.end.i43, label %wait_for_step.exit

for.body.i:
  %inc.i = add i64 %spins.011.i48, 1
  %19 = load atomic i64, ptr %claims2.i acquire, align 64
  %shr.i.i41 = lshr i64 %19, 32
  %conv.i.i42 = trunc i64 %shr.i.i41 to i32
  %cmp3.not.i = icmp eq i32 %conv.i.i42, %call
  br i1 %cmp3.not.i, label %if.end.i43, label %wait_for_step.exit

if.end.i43:
  %spins.011.i48 = phi i64 [ %inc.i, %for.body.i ], [ 1, %for.body.i.preheader ]
  tail call void @llvm.aarch64.hint(i32 1)
  %rem.i = and i64 %spins.011.i48, 4095
  %cmp4.i = icmp eq i64 %rem.i, 0
  br i1 %cmp4.i, label %if.then5.i, label %for.inc.i

if.then5.i:
  %call6.i = tail call i32 @sched_yield()
  br label %for.inc.i

for.inc.i:
  %20 = load atomic i64, ptr %units_done.i acquire, align 64
  %cmp.not.i44 = icmp eq i64 %20, %mul8
  br i1 %cmp.not.i44, label %wait_for_step.exit, label %for.body.i

wait_for_step.exit:
  %cmp.not.lcssa.i = phi i1 [ %cmp.not10.i, %lor.lhs.false ], [ %cmp.not10.i, %for.body.i.preheader ], [ %cmp.not.i44, %for.body.i ], [ %cmp.not.i44, %for.inc.i ]
  %inc = add nuw i64 %index.051, 1
  %exitcond.not = icmp ne i64 %inc, %2
  %or.cond.not = select i1 %cmp.not.lcssa.i, i1 %exitcond.not, i1 false
  br i1 %or.cond.not, label %for.body, label %cleanup16

cleanup16:
  ret void
}

define void @pool_run(ptr %pool, ptr %steps, i64 %num_steps, i64 %batch) nounwind {
entry:
  %steps1 = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 4
  %0 = ptrtoint ptr %steps to i64
  store atomic i64 %0, ptr %steps1 monotonic, align 64
  %num_steps2 = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 5
  store atomic i64 %num_steps, ptr %num_steps2 monotonic, align 8
  %1 = load atomic i32, ptr %pool monotonic, align 64
  %add = add i32 %1, 1
  %cmp32.not = icmp eq i64 %num_steps, 0
  br i1 %cmp32.not, label %for.cond.cleanup, label %for.body.lr.ph

for.body.lr.ph:
  %conv = zext i32 %add to i64
  %shl = shl nuw i64 %conv, 32
  br label %for.body

for.cond.cleanup:
  store atomic i32 %add, ptr %pool seq_cst, align 64
  tail call fastcc void @wake_workers(ptr %pool)
  tail call fastcc void @work(ptr %pool, i32 %add, i1 false)
  ret void

for.body:
  %index.033 = phi i64 [ 0, %for.body.lr.ph ], [ %inc, %for.body ]
  %units_done = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 10
  store atomic i64 0, ptr %units_done monotonic, align 64
  %claims = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 8
  store atomic i64 %shl, ptr %claims release, align 64
  %first_image = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 12
  %2 = load i64, ptr %first_image, align 16
  %spec.select = tail call i64 @llvm.usub.sat.i64(i64 %batch, i64 %2)
  %max_images = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 13
  %3 = load i64, ptr %max_images, align 8
  %cond.i = tail call i64 @llvm.umin.i64(i64 %spec.select, i64 %3)
  %num_items = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 7
  %items_per_image = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 11
  %4 = load i64, ptr %items_per_image, align 8
  %mul = mul i64 %cond.i, %4
  store atomic i64 %mul, ptr %num_items release, align 8
  %inc = add nuw i64 %index.033, 1
  %exitcond.not = icmp eq i64 %inc, %num_steps
  br i1 %exitcond.not, label %for.cond.cleanup, label %for.body
}

define internal fastcc void @wake_workers(ptr %pool) nounwind {
entry:
  %sleepers = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 2
  %0 = load atomic i32, ptr %sleepers seq_cst, align 64
  %cmp = icmp eq i32 %0, 0
  br i1 %cmp, label %return, label %if.end

if.end:
  %call.i = tail call i32 @sched_getcpu()
  %conv.i = zext i32 %call.i to i64
  %avoided_cpu.i = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 12
  %1 = load i64, ptr %avoided_cpu.i, align 64
  %cmp.i = icmp eq i64 %1, %conv.i
  %cmp2.i = icmp ugt i32 %call.i, 1023
  %or.cond.i = or i1 %cmp2.i, %cmp.i
  br i1 %or.cond.i, label %avoid_callers_cpu.exit, label %for.cond.preheader.i

for.cond.preheader.i:
  %div53.i = lshr i64 %conv.i, 6
  %rem.i = and i64 %conv.i, 63
  %shl.i = shl nuw i64 1, %rem.i
  %not.i = xor i64 %shl.i, -1
  br label %for.body.i

for.cond.cleanup.i:
  %tobool.not.i = icmp eq i64 %or.i, 0
  br i1 %tobool.not.i, label %avoid_callers_cpu.exit, label %for.cond13.preheader.i

for.cond13.preheader.i:
  %num_threads.i = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 6
  %2 = load i64, ptr %num_threads.i, align 16
  %cmp1456.i = icmp ugt i64 %2, 1
  br i1 %cmp1456.i, label %for.body17.lr.ph.i, label %if.then28.i

for.body17.lr.ph.i:
  %worker_cpus21.i = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 16
  br label %for.body17.i

for.body.i:
  %any.055.i = phi i64 [ 0, %for.cond.preheader.i ], [ %or.i, %for.body.i ]
  %word.054.i = phi i64 [ 0, %for.cond.preheader.i ], [ %inc.i, %for.body.i ]
  %cmp6.i = icmp eq i64 %word.054.i, %div53.i
  %cond.i = select i1 %cmp6.i, i64 %not.i, i64 -1
  %arrayidx.i = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 15, i64 %word.054.i
  %3 = load i64, ptr %arrayidx.i, align 8
  %and.i = and i64 %cond.i, %3
  %arrayidx8.i = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 16, i64 %word.054.i
  store i64 %and.i, ptr %arrayidx8.i, align 8
  %or.i = or i64 %and.i, %any.055.i
  %inc.i = add nuw nsw i64 %word.054.i, 1
  %exitcond.not.i = icmp eq i64 %inc.i, 16
  br i1 %exitcond.not.i, label %for.cond.cleanup.i, label %for.body.i

for.cond.cleanup16.i:
  br i1 %all_started.1.off0.i, label %if.then28.i, label %avoid_callers_cpu.exit

for.body17.i:
  %add59.i = phi i64 [ 1, %for.body17.lr.ph.i ], [ %add.i, %if.end23.i ]
  %worker.058.i = phi i64 [ 0, %for.body17.lr.ph.i ], [ %add59.i, %if.end23.i ]
  %all_started.0.off057.i = phi i1 [ true, %for.body17.lr.ph.i ], [ %all_started.1.off0.i, %if.end23.i ]
  %arrayidx18.i = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 17, i64 %worker.058.i
  %4 = load atomic i64, ptr %arrayidx18.i seq_cst, align 8
  %tobool19.not.i = icmp eq i64 %4, 0
  br i1 %tobool19.not.i, label %if.end23.i, label %if.then20.i

if.then20.i:
  %call22.i = tail call i64 (i64, ...) @syscall(i64 122, i64 %4, i64 128, ptr %worker_cpus21.i)
  br label %if.end23.i

if.end23.i:
  %all_started.1.off0.i = phi i1 [ %all_started.0.off057.i, %if.then20.i ], [ false, %for.body17.i ]
  %add.i = add nuw i64 %add59.i, 1
  %5 = load i64, ptr %num_threads.i, align 16
  %cmp14.i = icmp ult i64 %add.i, %5
  br i1 %cmp14.i, label %for.body17.i, label %for.cond.cleanup16.i

if.then28.i:
  store i64 %conv.i, ptr %avoided_cpu.i, align 64
  br label %avoid_callers_cpu.exit

avoid_callers_cpu.exit:
  %call1 = tail call i64 (i64, ...) @syscall(i64 98, ptr %pool, i32 129, i32 2147483647)
  br label %return

return:
  ret void
}

define void @pool_quiesce(ptr %pool, ptr %no_steps) nounwind {
entry:
  %steps = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 4
  %0 = ptrtoint ptr %no_steps to i64
  store atomic i64 %0, ptr %steps seq_cst, align 64
  %active_workers = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 10
  %1 = load atomic i64, ptr %active_workers seq_cst, align 64
  %cmp.not2 = icmp eq i64 %1, 0
  br i1 %cmp.not2, label %while.end, label %while.body

while.body:
  %call = tail call i32 @sched_yield()
  %2 = load atomic i64, ptr %active_workers seq_cst, align 64
  %cmp.not = icmp eq i64 %2, 0
  br i1 %cmp.not, label %while.end, label %while.body

while.end:
  ret void
}

declare i32 @sched_yield()

define void @pool_shutdown(ptr %pool) nounwind {
entry:
  %stop = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 8
  store atomic i64 1, ptr %stop seq_cst, align 64
  %0 = atomicrmw add ptr %pool, i32 1 seq_cst, align 4
  tail call fastcc void @wake_workers(ptr %pool)
  ret void
}

declare void @llvm.aarch64.hint(i32)

declare i32 @sched_getcpu()

declare i64 @llvm.umin.i64(i64, i64)

declare i64 @llvm.umax.i64(i64, i64)

declare i64 @llvm.usub.sat.i64(i64, i64)
